"""Checkpoints of a run whose weights were split over processes: folders of `ModelParallelStrategy`.

Such a folder holds shards in the format of `torch.distributed.checkpoint`, an index (`.metadata`)
and the rest of a Lightning checkpoint (`meta.pt`).
"""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX, REST = ".metadata", "meta.pt"
WEIGHTS = "state_dict."
ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
}
"""What an index may hold beside plain types, by module."""


def is_sharded(path: Path) -> bool:
    """Whether a path is such a folder, complete or not."""
    return path.is_dir() and ((path / REST).is_file() or any(path.glob("*.distcp")))


def check_shards(folder: Path) -> None:
    """Raises unless every file that the index names is there in full.

    Raises:
        ValueError: a file is missing or cut short.
    """
    index = _index(folder)
    for entry in index.storage_data.values():
        file = folder / entry.relative_path
        if file.parent != folder:
            raise ValueError(f"{folder} names {entry.relative_path!r}, which is outside of it")
        if not file.is_file() or file.stat().st_size < entry.offset + entry.length:
            raise ValueError(f"{file} is missing or cut short")
    if not (folder / REST).is_file():
        raise ValueError(f"{folder / REST} is missing")


def read_shards(folder: Path) -> dict[str, Any]:
    """The contents of such a folder as in a single file, without the optimizer.

    Raises:
        ValueError: a file is missing, cut short or of another program.
    """
    from torch.distributed import checkpoint

    check_shards(folder)
    index = _index(folder)
    entries = {k: v for k, v in index.state_dict_metadata.items() if k.startswith(WEIGHTS)}
    stored = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    if sum(e.size.numel() * e.properties.dtype.itemsize for e in entries.values()) > stored:
        raise ValueError(f"{folder}: its index describes more weights than its files hold")
    weights: dict[str, Tensor] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()
    }

    class Reader(checkpoint.FileSystemReader):
        """Reads the index without running code that it may hold."""

        def read_metadata(self, *args: Any, **options: Any) -> Any:
            return index

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        checkpoint.load(weights, storage_reader=Reader(folder), no_dist=True)
    rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    return {**rest, "state_dict": {k.removeprefix(WEIGHTS): w for k, w in weights.items()}}


class _Index(pickle.Unpickler):
    """Reads the pickled index, of which nothing but `ALLOWED` is called."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_type or name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f"the index names {module}.{name}, which no such checkpoint needs")


def _index(folder: Path) -> Any:
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{path} is missing, so the checkpoint was not written to its end")
    try:
        index = _Index(io.BytesIO(path.read_bytes())).load()
        entries = index.state_dict_metadata, index.storage_data
    except Exception as error:  # unpickling damaged or hostile bytes raises anything
        raise ValueError(f"{path} is damaged or of another program ({error})") from error
    if not all(isinstance(each, dict) for each in entries):
        raise ValueError(f"{path} is damaged or of another program")
    return index
