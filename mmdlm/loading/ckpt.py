"""The `.ckpt` files of `mmdlm fit`: a description of the model, and its weights."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from mmdlm.blueprint import Blueprint, build, describe
from mmdlm.loading.own import FIRST, first_edition
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer

ENTRY, PREFIX = "mmdlm", "model."


def entry(model: MultimodalDLM) -> dict[str, Any]:
    """Everything of a model but its weights, in plain types.

    Returns:
        `Blueprint.to_dict()` under "blueprint", and the tokenizer: "tokenizer" (the text of
        tokenizer.json, None without one), "chat" and "names", see `mmdlm.text.Tokenizer`.
    """
    tokenizer = model.tokenizer
    return {
        "blueprint": describe(model).to_dict(),
        "tokenizer": None if tokenizer is None else tokenizer.backend.to_str(),
        "chat": None if tokenizer is None else tokenizer.template,
        "names": {} if tokenizer is None else dict(tokenizer.names),
    }


def from_entry(saved: Mapping[str, Any], source: Path | str) -> MultimodalDLM:
    """The model that `entry` described, its weights on the meta device; nothing is downloaded.

    Args:
        saved: the entry, of this edition or the first.
        source: the file, for errors.

    Raises:
        ValueError: an entry is unknown or missing.
    """
    from tokenizers import Tokenizer as Backend

    plain = saved["blueprint"] if "blueprint" in saved else _first(saved)
    text = saved["tokenizer"]
    tokenizer = None
    if text is not None:
        tokenizer = Tokenizer(Backend.from_str(text), saved.get("chat"), saved.get("names"))
    return build(Blueprint.from_dict(plain, source), tokenizer)


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
    saved = read(checkpoint)
    model = from_entry(saved[ENTRY], Path(checkpoint))
    weights = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in saved["state_dict"].items()
        if name.startswith(PREFIX)
    }
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def read(checkpoint: str | Path) -> dict[str, Any]:
    """The contents of a `.ckpt` file; see `trained` for the errors."""
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; see runs/*/version_*/checkpoints")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a checkpoint of mmdlm fit, or it was cut short")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain types, which is not read; "
            "expected a checkpoint of mmdlm fit"
        ) from error
    if not isinstance(saved, dict) or ENTRY not in saved:
        raise ValueError(f"{path} holds no {ENTRY!r} entry; expected a checkpoint of mmdlm fit")
    return saved
