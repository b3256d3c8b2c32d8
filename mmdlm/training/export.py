"""From a Lightning checkpoint, which is for resuming, to a model folder, which is for using."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM

ENTRY, PREFIX = "mmdlm", "model."


def blueprint(model: MultimodalDLM) -> dict[str, Any]:
    """Everything of a model but its weights, in plain types, for a Lightning checkpoint."""
    from dataclasses import asdict

    return {
        "spec": asdict(model.spec),
        "encoders": {name: part.recipe() for name, part in model.encoders.items()},
        "adapters": {name: part.recipe() for name, part in model.adapters.items()},
        "tokenizer": None if model.tokenizer is None else model.tokenizer.backend.to_str(),
        "robot": None if model.robot is None else model.robot.to_dict(),
        "preset": model.preset,
    }


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    decoding: str | Path | None = None,
    card: str | Path | None = None,
) -> MultimodalDLM:
    """The trained model of a Lightning checkpoint, also written as a folder `mmdlm.load` opens.

    Args:
        checkpoint: a `.ckpt` file of `mmdlm fit`.
        out: folder to write.
        dtype: type of the weights in the file, "bfloat16" halves it; None for float32.
        decoding: YAML file of prompts, lengths and strategies by task.
        card: Markdown file that becomes the folder's README.md.
    Raises:
        FileNotFoundError: there is no such checkpoint, decoding file or card.
        ValueError: the checkpoint was not written by `mmdlm fit` or is damaged, or the decoding
            file is wrong.
    """
    from mmdlm import preset
    from mmdlm.checkpoint import save

    table = None if decoding is None else preset.read(Path(decoding))
    text = None if card is None else Path(card).read_text(encoding="utf-8")
    saved = read(checkpoint)
    model = build(saved[ENTRY])
    weights = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in saved["state_dict"].items()
        if name.startswith(PREFIX)
    }
    model.load_state_dict(weights, strict=True)
    if table is not None:
        model.preset = table
    save(model.eval(), out, dtype=dtype, card=text)
    return model


def read(checkpoint: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint of `mmdlm fit`; see `export` for the errors."""
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; see runs/*/version_*/checkpoints")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no checkpoint of mmdlm fit, or it was cut short")
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


def build(plan: dict[str, Any]) -> MultimodalDLM:
    """The untrained model of a blueprint; nothing is downloaded."""
    from tokenizers import Tokenizer as Backend

    from adapters.robot import Robot
    from encoders.rebuild import rebuild
    from mmdlm.backbones.family import Spec
    from mmdlm.backbones.transformer import TransformerConfig
    from mmdlm.model import MultimodalDLM
    from mmdlm.text import Tokenizer

    spec = dict(plan["spec"])
    spec["transformer"] = TransformerConfig(**spec["transformer"])
    spec["stop_ids"] = tuple(spec["stop_ids"])
    text, robot = plan["tokenizer"], plan["robot"]
    model = MultimodalDLM(
        Spec(**spec),
        {name: rebuild(offline(recipe)) for name, recipe in plan["encoders"].items()},
        {name: rebuild(recipe) for name, recipe in plan["adapters"].items()},
        None if text is None else Tokenizer(Backend.from_str(text)),
        None if robot is None else Robot.from_dict(robot),
    )
    model.preset = plan["preset"]
    return model


def offline(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe that downloads no weights: those of the checkpoint replace them anyway."""
    given = dict(recipe["init_args"])
    if "pretrained" in given:
        given["pretrained"] = False
    return {**recipe, "init_args": given}
