"""From a Lightning checkpoint, which is for resuming, to a model folder, which is for using.

And from one layout of such a folder to the other.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM

ENTRY, PREFIX = "mmdlm", "model."
CARD = "README.md"
# What is copied from folder to folder; of the tokenizer, other tools read other files than we do.
CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json", CARD),
)


def blueprint(model: MultimodalDLM) -> dict[str, Any]:
    """Everything of a model but its weights, in plain types, for a Lightning checkpoint."""
    from dataclasses import asdict

    return {
        "spec": asdict(model.spec),
        "encoders": {name: part.recipe() for name, part in model.encoders.items()},
        "adapters": {name: part.recipe() for name, part in model.adapters.items()},
        "tokenizer": None if model.tokenizer is None else model.tokenizer.backend.to_str(),
        "chat": None if model.tokenizer is None else model.tokenizer.template,
        "names": {} if model.tokenizer is None else model.tokenizer.names,
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
    layout: Literal["own", "published"] = "own",
    family: str | None = None,
    shard_bytes: float = 5e9,
) -> MultimodalDLM:
    """A model written as a folder that `mmdlm.load` opens, from a training or from another folder.

    Args:
        checkpoint: a `.ckpt` file of `mmdlm fit`; or a bundled name, folder or hub id, whose
            layout is changed, with its tokenizer's files as they are.
        out: folder to write.
        dtype: type of the weights in the file, "bfloat16" halves float32; None for float32 from a
            `.ckpt`, and for the stored type from a folder.
        decoding: YAML file of prompts, lengths and strategies by task.
        card: Markdown file that becomes the folder's README.md; None for the source folder's.
        layout: "own", or the "published" one of a family, which holds text models only.
        family: how to read a published checkpoint whose config.json does not tell; for any other
            source, the family whose published layout is written (None: the model's own).
        shard_bytes: most bytes per file of weights in the published layout.
    Raises:
        FileNotFoundError: there is no such checkpoint, decoding file or card.
        ValueError: the checkpoint is damaged, the decoding file is wrong, or the layout has no
            place for what the model is.
    """
    from mmdlm import preset
    from mmdlm.checkpoint import save, save_published

    table = None if decoding is None else preset.read(Path(decoding))
    text = None if card is None else Path(card).read_text(encoding="utf-8")
    if layout not in ("own", "published"):
        raise ValueError(f"layout={layout!r}, expected 'own' or 'published'")
    if layout == "published" and (table is not None or text is not None):
        raise ValueError("the published layout has no decoding.yaml, nor a card of ours")
    folder, written = None, family
    if Path(checkpoint).suffix == ".ckpt" or Path(checkpoint).is_file():
        model = trained(checkpoint)
    else:
        model, folder, written = opened(checkpoint, Path(out), family)
    if layout == "published":
        save_published(model, out, dtype=dtype, shard_bytes=shard_bytes, family=written)
    elif written is not None:
        raise ValueError(f"family={family!r} has no effect on {checkpoint}; leave it out")
    else:
        model.preset = model.preset if table is None else table
        save(model, out, dtype=dtype, card=text)
    for name in CARRIED if folder else ():
        if (folder / name).is_file() and not (name == CARD and text is not None):
            shutil.copyfile(folder / name, Path(out) / name)
    return model


def trained(checkpoint: str | Path) -> MultimodalDLM:
    """The model of a `.ckpt` file of `mmdlm fit`; see `export` for the errors."""
    saved = read(checkpoint)
    model = build(saved[ENTRY])
    weights = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in saved["state_dict"].items()
        if name.startswith(PREFIX)
    }
    model.load_state_dict(weights, strict=True)
    return model.eval()


def opened(
    source: str | Path, out: Path, family: str | None
) -> tuple[MultimodalDLM, Path, str | None]:
    """The model of a folder in its stored type, that folder, and the family that is left to write.

    Raises:
        ValueError: it would be overwritten.
    """
    from mmdlm.checkpoint import load
    from mmdlm.loading.shards import read_json
    from mmdlm.loading.source import find

    folder = find(source)
    if folder.resolve() == out.resolve():
        raise ValueError(f"{out} is the checkpoint itself; give another folder to write")
    own = "format" in read_json(folder / "config.json")
    model = load(folder, device="cpu", dtype="stored", family=None if own else family)
    return model, folder, family if own else None


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
    from mmdlm.checkpoint import spec_of
    from mmdlm.model import MultimodalDLM
    from mmdlm.text import Tokenizer

    text, robot = plan["tokenizer"], plan["robot"]
    model = MultimodalDLM(
        spec_of(plan["spec"], "this checkpoint"),
        {name: rebuild(offline(recipe)) for name, recipe in plan["encoders"].items()},
        {name: rebuild(recipe) for name, recipe in plan["adapters"].items()},
        None
        if text is None
        else Tokenizer(Backend.from_str(text), plan.get("chat"), plan.get("names")),
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
