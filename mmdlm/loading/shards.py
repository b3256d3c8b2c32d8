"""Safetensors files, single or in shards with an index, read and written tensor by tensor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmdlm.files import POINTER, blaming, check_pointer, present, preview, read_json

CONVERT = (
    "download those, or convert the pickle where you trust it: "
    "tensors = torch.load(file, weights_only=True); safetensors.torch.save_file("
    "{name: tensor.clone() for name, tensor in tensors.items()}, 'model.safetensors')"
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What safetensors calls the types that a model of ours may have.
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MOST_MISSING = 100  # shards that an error still lists by name
# Published names of the head. A tied one need not be stored; loading reports any other that is not.
HEADS = ("lm_head.weight", "model.transformer.ff_out.weight")
CHUNK = 2**22  # bytes held at once on their way to another type or device; fits into a CPU cache


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Args:
        file: safetensors file.
        shape: its shape.
        dtype: its type as safetensors spells it, "BF16".
        start: where its bytes begin in the file.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int = 0


def index(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's weights by name; only the headers are read.

    Args:
        folder: holds a single file, or shards with or without an index; or the path of one
            safetensors file.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ValueError: a file is truncated or not a safetensors file, the index names tensors its
            shards do not hold (other than a head, which may be tied), or two shards hold the same
            tensor.
    """
    files, listed = ([folder], {}) if folder.is_file() else _files(folder)
    stored: dict[str, Stored] = {}
    for file in files:
        held = _header(file)
        if twice := stored.keys() & held.keys():
            name = min(twice)
            raise ValueError(
                f"{folder}: tensor {name} is in {stored[name].file.name} and in {file.name}; "
                "expected it once, download the folder again"
            )
        stored |= held
    needed = {n: f for n, f in listed.items() if n in stored or not n.endswith(HEADS)}
    absent = [n for n, f in needed.items() if n not in stored or stored[n].file.name != f]
    if absent:
        raise ValueError(
            f"{folder}: the index names {preview(absent)}, which {listed[absent[0]]} does not "
            "hold; index and shards are of different checkpoints, download the folder again"
        )
    return stored


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a folder, and tensor names with their file where an index has them."""
    if present(folder / SINGLE):
        return [folder / SINGLE], {}
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        listed = weight_map(indices[0])
        names = sorted(set(listed.values()))
    else:
        listed, names = {}, sorted(file.name for file in folder.glob("*.safetensors"))
        counts = [re.fullmatch(r"(.*)-\d+-of-(\d+)\.safetensors", name) for name in names]
        if counts and all(counts):
            stem, total = counts[0].groups()
            names = _numbered(folder, stem, total, names)
        elif len(names) > 1:
            raise ValueError(
                f"{folder} holds {preview(names)} and no index; expected {SINGLE}, or shards with "
                f"{INDEX}"
            )
    missing = [name for name in names if not present(folder / name)]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(names)} weight files are missing: "
            f"{preview(missing)}; download them"
        )
    if not names:
        pickled = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        hint = f" ({preview(pickled)} are pickles, which are not read)" if pickled else ""
        move = CONVERT if pickled else "download them"
        raise FileNotFoundError(f"{folder} holds no *.safetensors{hint}; {move}")
    return [folder / name for name in names], listed


def weight_map(file: Path) -> dict[str, str]:
    """Tensor names with their file, as an index gives them.

    Raises:
        ValueError: the index is damaged, or its weight_map is not a table of file names.
    """
    listed = read_json(file).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if wrong or not names:
        raise ValueError(
            f"{file}: weight_map {f'holds {preview(wrong)}' if wrong else 'is empty or absent'}; "
            "expected file names by tensor, download the index again"
        )
    return listed


def _numbered(folder: Path, stem: str, total: str, names: list[str]) -> list[str]:
    """Names of all shards of which one says how many there are.

    Raises:
        FileNotFoundError: most are missing, so that the count itself may be wrong.
    """
    if int(total) > 2 * len(names) + MOST_MISSING:
        raise FileNotFoundError(
            f"{folder} holds {len(names)} of {total} weight files, such as {names[0]}; download "
            "the others, or correct its name"
        )
    return [f"{stem}-{i:0{len(total)}}-of-{total}.safetensors" for i in range(1, int(total) + 1)]


def _header(file: Path) -> dict[str, Stored]:
    """The tensors of one file."""
    if not present(file):
        raise FileNotFoundError(f"there is no file {file}; download it again")
    try:
        with file.open("rb") as f:
            check_pointer(f.read(len(POINTER)), file)
        with safe_open(file, framework="pt"):  # checks that table and length of the file agree
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: {file.stat().st_size} bytes that are not a valid safetensors file "
            f"({error}); download it again"
        ) from error
    with blaming(file), file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        table = json.loads(f.read(size))
        return {
            name: Stored(file, tuple(e["shape"]), e["dtype"], 8 + size + e["data_offsets"][0])
            for name, e in table.items()
            if name != "__metadata__"
        }


def copy(stored: Mapping[str, Stored], targets: Mapping[str, Tensor]) -> None:
    """Copies stored tensors into given ones of the same shape, a chunk at a time.

    Bytes are read, not mapped: mapped pages count as memory of the process until the file is
    closed, and faulting them in one by one is slower.

    Args:
        stored: tensors in files by name.
        targets: under the same names, contiguous views of any type and device; overwritten. Those
            on the meta device are skipped.

    Raises:
        ValueError: a file was changed meanwhile, or torch has no such type.
    """
    real = {name: target for name, target in targets.items() if not target.is_meta}
    pinned = any(target.is_cuda for target in real.values())
    chunk = torch.empty(0, dtype=torch.uint8)
    for file in sorted({stored[name].file for name in real}):
        names = [name for name in real if stored[name].file == file]
        with file.open("rb", buffering=0) as f:
            for name in sorted(names, key=lambda n: stored[n].start):
                source, flat = stored[name], real[name].view(-1)
                if source.dtype not in TYPES:
                    raise ValueError(f"{file}: {name} is {source.dtype}, expected {list(TYPES)}")
                kind = TYPES[source.dtype]
                f.seek(source.start)
                if flat.dtype == kind and flat.device.type == "cpu":
                    _fill(f, flat)
                    continue
                if not len(chunk):
                    chunk = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned)
                for part in flat.split(CHUNK // kind.itemsize):
                    read = chunk[: len(part) * kind.itemsize].view(kind)
                    _fill(f, read)
                    part.copy_(read)


def _fill(file: FileIO, target: Tensor) -> None:
    """Reads the next bytes of a file into a contiguous tensor on the CPU."""
    left = memoryview(target.view(torch.uint8).numpy())
    while left:
        count = file.readinto(left)
        if not count:
            raise ValueError(f"{file.name} ends early: it was changed while it was read")
        left = left[count:]


def write(
    folder: Path,
    sources: Mapping[str, Tensor],
    types: Mapping[str, torch.dtype],
    shard_bytes: float = 5e9,
    single: str | None = None,
) -> None:
    """Writes tensors as one file, or as shards with an index.

    Args:
        folder: existing folder; weights of an earlier save are replaced.
        sources: tensors by name, which may share memory and lie on any device.
        types: type of each in the file.
        shard_bytes: most bytes per file.
        single: name of the one file to write instead, which leaves other files alone.
    """
    if single is not None:
        shard_bytes = float("inf")
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, source in sources.items():
        size = source.numel() * types[name].itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    count = len(shards)
    numbered = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    files = [single or SINGLE] if count == 1 else numbered
    for file, names in zip(files, shards, strict=True):
        # Copies: parts of one fused tensor share memory, which the format refuses.
        data = {n: sources[n].to("cpu", types[n], copy=True).contiguous() for n in names}
        save_file(data, folder / f"{file}.tmp", metadata={"format": "pt"})
    old = [*folder.glob("model-*-of-*.safetensors"), folder / SINGLE, folder / INDEX]
    for file in old if single is None else ():
        file.unlink(missing_ok=True)
    for file in files:
        # save_file makes files that only their owner can read.
        (folder / f"{file}.tmp").chmod(0o644)
        os.replace(folder / f"{file}.tmp", folder / file)
    if count > 1:
        where = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / INDEX, table)


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Writes an object as indented JSON."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
