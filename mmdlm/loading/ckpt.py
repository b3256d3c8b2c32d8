"""The `.ckpt` files of `mmdlm fit`: a description of the model, and its weights.

With `ModelParallelStrategy` a folder takes the place of the file, see `mmdlm.loading.sharded`.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mmdlm.blueprint import Blueprint, Budget, build, describe
from mmdlm.files import POINTER, blaming, check_pointer, check_text, present, preview
from mmdlm.loading.contents import check_published
from mmdlm.loading.lora import LoraAdapter, exported
from mmdlm.loading.own import FIRST, first_edition
from mmdlm.loading.sharded import check_shards, is_sharded, read_shards
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


def digest(files: Iterable[Path]) -> str:
    """24 hex digits that change with the contents of weight files, not with their place."""
    found = hashlib.blake2b(digest_size=12)
    for file in sorted(files):
        with file.open("rb") as data:
            found.update(hashlib.file_digest(data, hashlib.blake2b).digest())
    return found.hexdigest()


@dataclass(frozen=True)
class Base:
    """The model that a LoRA adapter was trained on, and what was added to it.

    Args:
        source: its name, folder or hub id, as the user gave it.
        digest: of its weights.
        lora: adapter_config.json.
        trained: names of the parameters in the checkpoint that were trained.
    """

    source: str
    digest: str
    lora: dict[str, Any]
    trained: list[str]

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self | None:
        """What `read` found of it; None in a checkpoint of a whole model."""
        return cls(**saved[ENTRY]["base"]) if saved[ENTRY].get("base") else None

    def not_whole(self, checkpoint: str | Path) -> ValueError:
        """The error where a checkpoint of a whole model is expected."""
        return ValueError(
            f"{checkpoint} holds a LoRA adapter of {self.source} only; export it with "
            "mmdlm export --merge for a whole model"
        )

    def check(self, digest: str, checkpoint: str | Path) -> None:
        """Raises if weights are not those of the model that was trained on.

        Args:
            digest: of the weights.
            checkpoint: the file, for the error.

        Raises:
            ValueError: they are not.
        """
        if digest != self.digest:
            raise ValueError(
                f"{checkpoint} holds a LoRA adapter of {self.source}, whose weights have changed "
                f"since (digest {digest}, expected {self.digest}); restore them"
            )

    def adapter(self, saved: Mapping[str, Any], checkpoint: Path) -> LoraAdapter:
        """The adapter in a checkpoint.

        Args:
            saved: what `read` found.
            checkpoint: the file, for errors.

        Raises:
            ValueError: a tensor is missing.
        """
        with blaming(checkpoint):
            model = from_entry(saved[ENTRY], checkpoint)
            named = {
                exported(name.removeprefix(PREFIX)): saved["state_dict"][name]
                for name in self.trained
            }
            return LoraAdapter.trained(self.lora, named, model)


def trained(checkpoint: str | Path, saved: Mapping[str, Any] | None = None) -> MultimodalDLM:
    """The model of a `.ckpt` file, on the CPU in the type it was trained in (eval mode).

    Args:
        checkpoint: the file.
        saved: what `read` found in it, if it was read already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or of another program, or holds an adapter only.
    """
    path = Path(checkpoint)
    saved = read(path) if saved is None else saved
    if (base := Base.of(saved)) is not None:
        raise base.not_whole(path)
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


def is_checkpoint(source: str | Path) -> bool:
    """Whether a source is a checkpoint of a run and not the folder or name of a model."""
    path = Path(source)
    return path.suffix == ".ckpt" or path.is_file() or is_sharded(path)


def is_averaged(checkpoint: str | Path) -> bool:
    """Whether a checkpoint holds averaged weights, with those of the last step beside them."""
    path = Path(checkpoint)
    if not path.is_file():
        return False
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return "current_model_state" in saved


def read(checkpoint: str | Path) -> dict[str, Any]:
    """The contents of a `.ckpt` file; see `trained` for the errors."""
    path = Path(checkpoint)
    if not is_sharded(path) and present(path):
        with path.open("rb") as file:
            check_pointer(file.read(len(POINTER)), path)
    check_whole(path)
    try:
        saved = read_shards(path) if path.is_dir() else _read_file(path)
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


def _read_file(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        packed = [each.filename for each in archive.infolist() if each.compress_type]
    if packed:  # torch.save stores; small compressed entries may unpack to any size
        raise ValueError(f"it holds compressed entries ({preview(packed)})")
    return torch.load(path, map_location="cpu", weights_only=True)


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
    if not path.is_file() and not is_sharded(path):
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
    """Whether a file is an archive of torch.save with the right checksum for every tensor.

    Of a folder of shards, whether each file has the size that the index says.
    """
    try:
        if path.is_dir():
            check_shards(path)
            return True
        with zipfile.ZipFile(path) as archive:
            is_plain = all(e.compress_type == zipfile.ZIP_STORED for e in archive.infolist())
            return is_plain and archive.testzip() is None
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile):
        return False
