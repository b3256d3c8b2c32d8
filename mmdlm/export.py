"""A trained or loaded model written as a folder, in our layout or in a published one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from mmdlm.checkpoint import load, save, save_published
from mmdlm.decoding import preset
from mmdlm.files import read_json
from mmdlm.loading.ckpt import trained
from mmdlm.loading.own import CARD, read_tasks
from mmdlm.loading.source import find
from mmdlm.model import MultimodalDLM

# Copied from folder to folder; other tools read other files of a tokenizer than we do.
CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json", CARD),
    *("preprocessor_config.json", "processor_config.json"),
)


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
            `.ckpt`, and for the stored types from a folder.
        decoding: YAML file of prompts, lengths and strategies by task.
        card: Markdown file that becomes the folder's README.md; None for the source folder's.
        layout: "own", or the "published" one of the system or family the model is of.
        family: how to read a published checkpoint that config.json does not identify; for any other
            source, the family whose published layout is written (None: the model's own).
        shard_bytes: most bytes per file of weights in the published layout.
    Raises:
        FileNotFoundError: there is no such checkpoint, decoding file or card.
        ValueError: the checkpoint is damaged, the decoding file is wrong, or the layout has no
            place for what the model is.
    """
    tasks = None if decoding is None else read_tasks(Path(decoding))
    if tasks is not None:
        preset.check(tasks, Path(decoding))
    text = None if card is None else Path(card).read_text(encoding="utf-8")
    if layout not in ("own", "published"):
        raise ValueError(f"layout={layout!r}, expected 'own' or 'published'")
    if layout == "published" and (tasks is not None or text is not None):
        raise ValueError("the published layout has no decoding.yaml and no README.md of ours")
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
        model.preset = model.preset if tasks is None else tasks
        save(model, out, dtype=dtype, card=text)
    for name in CARRIED if folder else ():
        if (folder / name).is_file() and not (name == CARD and text is not None):
            shutil.copyfile(folder / name, Path(out) / name)
    return model


def opened(
    source: str | Path, out: Path, family: str | None
) -> tuple[MultimodalDLM, Path, str | None]:
    """The model of a folder in its stored types, that folder, and the family that is left to write.

    Raises:
        ValueError: it would be overwritten.
    """
    folder = find(source)
    if folder.resolve() == out.resolve():
        raise ValueError(f"{out} is the checkpoint itself; give another folder to write")
    own = "format" in read_json(folder / "config.json")
    model = load(folder, device="cpu", dtype="stored", family=None if own else family)
    return model, folder, family if own else None
