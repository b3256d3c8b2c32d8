"""The metadata of LeRobotDataset v2.0 and v2.1 folders, in the terms of v3.0.

These have one data file and one video per episode, and JSON Lines instead of parquet in `meta/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmdlm.data.records import rows

VERSIONS = ("v2.0", "v2.1")


def tasks(root: Path) -> dict[int, str]:
    """Instructions by task index."""
    return {row["task_index"]: row["task"] for row in _entries(root, "tasks", "task_index", "task")}


def episodes(root: Path, chunk_size: int) -> list[dict[str, Any]]:
    """A row per episode, in order, with the keys that rows of v3.0 have too.

    Args:
        root: folder of the data set.
        chunk_size: episodes per folder of files.
    """
    found = _entries(root, "episodes", "episode_index", "length")
    found.sort(key=lambda row: row["episode_index"])
    start = 0
    for row in found:
        row |= {"dataset_from_index": start, "dataset_to_index": start + row["length"]}
        row |= {"episode_chunk": row["episode_index"] // chunk_size, "tasks": row.get("tasks", ())}
        start = row["dataset_to_index"]
    return found


def stats(root: Path) -> dict[str, dict[str, Any]]:
    """Min, max, mean, std and count per feature over all episodes of a v2.1 folder, as lists."""
    parts: dict[str, list[dict[str, np.ndarray]]] = {}
    for row in _entries(root, "episodes_stats", "stats"):
        for key, values in row["stats"].items():
            arrays = {name: np.asarray(value, np.float64) for name, value in values.items()}
            parts.setdefault(key, []).append(arrays)
    return {key: _whole(found) for key, found in parts.items()}


def _whole(parts: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Statistics of several episodes together."""
    count = np.array([part["count"].item() for part in parts])
    share = count / count.sum()
    mean = sum(part["mean"] * one for part, one in zip(parts, share, strict=True))
    square = sum(
        (part["std"] ** 2 + (part["mean"] - mean) ** 2) * one
        for part, one in zip(parts, share, strict=True)
    )
    found = {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(square),
    }
    whole = {name: value.tolist() for name, value in found.items()}
    return whole | {"count": [int(count.sum())]}


def _entries(root: Path, name: str, *keys: str) -> list[dict[str, Any]]:
    path = root / "meta" / f"{name}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which a data set of version 2 has")
    found = []
    for place, row in rows(path):
        missing = [key for key in keys if key not in row]
        if missing:
            raise ValueError(f"{place} lacks {', '.join(missing)}; it has {', '.join(row)}")
        found.append(row)
    return found
