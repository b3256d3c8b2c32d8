"""The `.ckpt` files of `mmdlm fit`: a description of the model, and its weights."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdlm.blueprint import Blueprint, Budget, build, describe
from mmdlm.files import POINTER, blaming, check_pointer, check_text, present, preview
from mmdlm.loading.contents import check_published
from mmdlm.loading.own import FIRST, first_edition
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer, parse

ENTRY, PREFIX = "mmdlm", "model."


class DamagedError(ValueError):
    """A `.ckpt` file is cut short or damaged."""


def entry(model: MultimodalDLM) -> dict[str, Any]:
    """Everything of a model but its weights, in plain types.

    Returns:
        `Blueprint.to_dict()` under "blueprint", and the tokenizer: "tokenizer" (the text of
        tokenizer.json, None without one), "chat", "names" and "files", see
        `mmdlm.text.Tokenizer`; "published", see `MultimodalDLM`.
    """
    tokenizer = model.tokenizer
    return {
        "blueprint": describe(model).to_dict(),
        "tokenizer": None if tokenizer is None else tokenizer.backend.to_str(),
        "chat": None if tokenizer is None else tokenizer.template,
        "names": {} if tokenizer is None else dict(tokenizer.names),
        "files": {} if tokenizer is None else dict(tokenizer.files),
        "published": model.published,
    }


def from_entry(
    saved: Mapping[str, Any], source: Path | str, budget: Budget | None = None
) -> MultimodalDLM:
    """The model that `entry` described, its weights on the meta device; nothing is downloaded.

    Args:
        saved: the entry, of this edition or the first.
        source: the file, for errors.
        budget: see `mmdlm.blueprint.build`.

    Raises:
        ValueError: an entry is unknown or missing, or the budget is exceeded.
    """
    plain = saved["blueprint"] if "blueprint" in saved else _first(saved)
    text = saved["tokenizer"]
    tokenizer = None
    if text is not None:
        further = (saved.get(name) for name in ("chat", "names", "files"))
        tokenizer = Tokenizer(parse(text, source), *further)
    model = build(Blueprint.from_dict(plain, source), tokenizer, budget)
    model.published = dict(saved.get("published") or {})
    check_published(model.published)
    return model


def _first(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The blueprint in an entry of the first edition."""
    missing = {"spec", "encoders", "adapters", "robot", "preset"} - set(saved)
    if missing:
        raise ValueError(f"the {ENTRY!r} entry lacks {sorted(missing)}; export it again")
    parts = {name: saved[name] for name in ("spec", "encoders", "adapters")}
    outputs = {} if saved["robot"] is None else {"actions": saved["robot"]}
    return first_edition({"format": FIRST, **parts}) | {
        "outputs": outputs,
        "tasks": saved["preset"],
    }


def trained(checkpoint: str | Path) -> MultimodalDLM:
    """The model of a `.ckpt` file, on the CPU in the type it was trained in (eval mode).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or of another program.
    """
    path = Path(checkpoint)
    saved = read(path)
    with blaming(path):
        weights = {
            name.removeprefix(PREFIX): tensor
            for name, tensor in saved["state_dict"].items()
            if name.startswith(PREFIX)
        }
        budget = Budget.of(tensor.shape for tensor in weights.values())
        model = from_entry(saved[ENTRY], path, budget)
        try:
            model.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"the weights do not fit the description beside them: {error}"
            ) from error
    return model.eval()


def read(checkpoint: str | Path) -> dict[str, Any]:
    """The contents of a `.ckpt` file; see `trained` for the errors."""
    path = Path(checkpoint)
    if present(path):
        with path.open("rb") as file:
            check_pointer(file.read(len(POINTER)), path)
    check_whole(path)
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [each.filename for each in archive.infolist() if each.compress_type]
        if packed:  # torch.save stores; small compressed entries may unpack to any size
            raise ValueError(f"it holds compressed entries ({preview(packed)})")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged or hostile bytes raises anything
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain types, which is not read "
            f"({_first_line(error)}); expected a checkpoint of mmdlm fit"
        ) from error
    if not isinstance(saved, dict) or not isinstance(saved.get(ENTRY), Mapping):
        raise ValueError(f"{path} holds no {ENTRY!r} entry; expected a checkpoint of mmdlm fit")
    check_text(saved[ENTRY], path)
    weights = saved.get("state_dict")
    if not isinstance(weights, Mapping) or not all(map(_has_memory, weights.values())):
        raise ValueError(
            f"{path}: its state_dict is not a table of tensors; expected a checkpoint of mmdlm fit"
        )
    return saved


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _has_memory(tensor: Any) -> bool:
    """Whether it is a tensor with memory for each of its numbers."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.is_sparse:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def check_whole(path: Path) -> None:
    """Raises unless a `.ckpt` file is whole; it is read once.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: it is cut short or damaged; the error names the newest whole one beside it.
    """
    if path.is_dir():  # of a sharded run
        return
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; see runs/*/version_*/checkpoints")
    if is_whole(path):
        return
    other = newest_whole(path.parent.glob(f"*{path.suffix}"))
    hint = f"the newest whole one beside it is {other}" if other else "no other beside it is whole"
    raise DamagedError(
        f"{path} is not a checkpoint of mmdlm fit, or it was cut short or damaged; {hint}"
    )


def newest_whole(files: Iterable[Path]) -> Path | None:
    """The `.ckpt` file that was written last among those that are whole; None if none is."""
    by_age = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)
    return next(filter(is_whole, by_age), None)


def is_whole(path: Path) -> bool:
    """Whether a file is an archive of torch.save with the right checksum for every tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            is_plain = all(e.compress_type == zipfile.ZIP_STORED for e in archive.infolist())
            return is_plain and archive.testzip() is None
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile):
        return False
