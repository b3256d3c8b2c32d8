"""Parts of a published system that are checkpoints of their own, found by the names of tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmdlm.loading.shards import index, weight_map
from mmdlm.systems.system import Beside, Part


def find(folder: Path, config: Mapping[str, Any], parts: Iterable[Part]) -> tuple[Beside, ...]:
    """Where the weights are that are not in the single file or the shards of a folder.

    These are further safetensors files of the folder, sub-folders with a checkpoint of a part, and
    for a part that is in neither, the `_name_or_path` of its entry in config.json where it is a
    folder on this machine. Other sub-folders are left alone.

    Args:
        folder: the checkpoint.
        config: its config.json.
        parts: see `mmdlm.systems.system.System.PARTS`; without any, nothing is searched.

    Raises:
        ValueError: a file is damaged.
    """
    parts = tuple(parts)
    if not parts:
        return ()
    files, loose = sorted(folder.glob("*.safetensors")), _loose(folder)
    held = {place: set(index(place)) for place in (*loose, *_folders(folder))}
    names = set() if loose == files else set(index(folder))
    names = names.union(*(held[file] for file in loose))
    found = {place: part for place in held if (part := _part(held[place], parts)) or place in loose}
    for part in parts:
        is_there = any(name.startswith(part.prefix) for name in names)
        place = folder / ((config.get(part.config) or {}).get("_name_or_path") or "")
        if part in found.values() or is_there or place == folder:
            continue
        if _has_weights(place) and _part(set(index(place)), parts) == part:
            found[place] = part
    return tuple(
        Beside(os.path.relpath(place, folder), part.prefix, part.own)
        if part
        else Beside(place.name, "")
        for place, part in found.items()
    )


def _loose(folder: Path) -> list[Path]:
    """Safetensors files that are not shards; none where there is only one file."""
    files, indices = sorted(folder.glob("*.safetensors")), folder.glob("*.safetensors.index.json")
    shards = {name for i in indices for name in weight_map(i).values()}
    loose = [f for f in files if f.name not in shards and "-of-" not in f.stem]
    return loose if len(files) > 1 else []


def _folders(folder: Path) -> list[Path]:
    """Sub-folders with weights."""
    return [place for place in sorted(folder.iterdir()) if _has_weights(place)]


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*.safetensors"))


def _part(names: set[str], parts: tuple[Part, ...]) -> Part | None:
    """The part whose own checkpoint holds these tensors, None for any other checkpoint."""
    fitting = (p for p in parts if any(name.startswith(p.own) for name in names))
    return next(fitting, None)
