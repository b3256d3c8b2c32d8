"""A trained or loaded model written as a folder, in our layout or in a published one."""

from __future__ import annotations

import codecs
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from mmdlm import discover
from mmdlm.atomic import replacing_folder
from mmdlm.checkpoint import load, save, save_published
from mmdlm.decoding import preset
from mmdlm.files import find, read_input, read_json
from mmdlm.loading.ckpt import Base, digest, is_checkpoint, read, trained
from mmdlm.loading.contents import BESIDE, CONFIG
from mmdlm.loading.lora import CONFIG as ADAPTER
from mmdlm.loading.lora import WEIGHTS as ADAPTER_WEIGHTS
from mmdlm.loading.lora import LoraAdapter
from mmdlm.loading.own import CARD, DECODING, PUBLISHED, STATISTICS, read_tasks
from mmdlm.loading.published import SYSTEMS
from mmdlm.model import MultimodalDLM
from mmdlm.systems.system import System
from mmdlm.text import MORE_CHATS, TOKENIZER, Tokenizer

# Copied from folder to folder, where other programs read other files of a vocabulary than we do.
COPIED = ("vocab.json", "merges.txt", "tokenizer.model", CARD)
# What an earlier export may have written, by pattern; other files of its folder stay.
REPLACED = (
    *("model.safetensors", "model-*-of-*.safetensors", "*.safetensors.index.json", "config.json"),
    *(
        ADAPTER,
        ADAPTER_WEIGHTS,
        STATISTICS,
        DECODING,
        PUBLISHED,
        *BESIDE,
        *TOKENIZER,
        "tokenizer.model",
        MORE_CHATS,
    ),
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
    adapter: str | Path | None = None,
    merge: bool = False,
) -> MultimodalDLM | None:
    """A model written as a folder that `mmdlm.load` opens, from a training or from another folder.

    The `.ckpt` file of a training with LoRA becomes an adapter folder in peft's format.

    An earlier export there is replaced at once when everything is written, or not at all. Files of
    other kinds in the folder stay.

    Args:
        checkpoint: a `.ckpt` file of `mmdlm fit`; or a bundled name, folder or hub id, whose
            layout is changed, with the files that other programs read.
        out: folder to write.
        dtype: type of the weights in the file, "bfloat16" halves float32; None for float32 from a
            `.ckpt` or with an adapter, and for the stored types from a folder alone.
        decoding: YAML file of prompts, lengths and strategies by task.
        card: Markdown file that becomes the folder's README.md; None for the source folder's.
        layout: "own", or the "published" one of the system or family the model is of.
        family: how to read a published checkpoint that config.json does not identify; for any other
            source, the family whose published layout is written (None: the model's own).
        shard_bytes: most bytes per file of weights in the published layout.
        adapter: a LoRA adapter that is merged into the weights of a folder, see `mmdlm.load`.
        merge: of the training with LoRA, write the whole model with the adapter merged into it.
    Returns:
        the model, None if an adapter was written.
    Raises:
        FileNotFoundError: there is no such checkpoint, decoding file or card; or the model that an
            adapter was trained on is gone.
        NotADirectoryError: `out` is a file.
        ValueError: the checkpoint is damaged, the decoding file is wrong, the layout has no place
            for what the model is, or `out` cannot be replaced.
    """
    tasks = None if decoding is None else read_tasks(Path(decoding))
    preset.check(tasks or {}, Path(decoding or ""))
    text = None if card is None else read_input(Path(card))
    if layout not in ("own", "published"):
        raise ValueError(f"layout={layout!r}, expected 'own' or 'published'")
    if layout == "published" and (tasks is not None or text is not None):
        raise ValueError("the published layout has no decoding.yaml and no README.md of ours")
    out = replaceable(out)
    folder, written = None, family
    if is_checkpoint(checkpoint):
        if adapter is not None:
            raise ValueError(
                f"adapter={str(adapter)!r} has no effect on {checkpoint}; leave it out"
            )
        model = _of_training(checkpoint, merge)
        if isinstance(model, LoraAdapter):
            if (layout, dtype, family) != ("own", None, None):
                raise ValueError(
                    "layout, dtype and family are about a whole model; give merge=True"
                )
            _write_adapter(model if tasks is None else replace(model, tasks=tasks), out, text)
            return None
    else:
        _check_merge(merge, adapter is None, checkpoint)
        model, folder, written = opened(checkpoint, out, family, adapter, dtype)
    if layout == "own" and written is not None:
        raise ValueError(f"family={family!r} has no effect on {checkpoint}; leave it out")
    with replacing_folder(out) as new:
        if layout == "published":
            save_published(model, new, dtype=dtype, shard_bytes=shard_bytes, family=written)
        else:
            model.preset = model.preset if tasks is None else tasks
            save(model, new, dtype=dtype, card=text)
        if folder is not None:
            copy_files(folder, new, adapter is None or not _has_grown(model, folder))
        if out.is_dir():
            keep_others(out, new)
    return model


def _check_merge(merge: bool, has_none: bool, checkpoint: str | Path) -> None:
    if merge and has_none:
        raise ValueError(f"merge has no effect: {checkpoint} holds no LoRA adapter; leave it out")


def merged(saved: Mapping[str, Any], checkpoint: Path) -> MultimodalDLM:
    """The model of a training with LoRA, the adapter merged into the weights, in float32.

    Args:
        saved: what `mmdlm.loading.ckpt.read` found in the checkpoint.
        checkpoint: the file, for errors.

    Raises:
        FileNotFoundError: the model that the adapter was trained on is gone.
        ValueError: it has changed.
    """
    base = Base.of(saved)
    try:
        find(base.source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{checkpoint} holds a LoRA adapter of {base.source}, which is not there: put it back; "
            "or export the adapter without merge, and merge that: mmdlm export MODEL --adapter DIR"
        ) from error
    adapter = base.adapter(saved, checkpoint)
    model = load(base.source, device="cpu", dtype="float32", pack=False, adapter=adapter)
    base.check(digest(model.report.files), checkpoint)
    return model


def _of_training(checkpoint: str | Path, merge: bool) -> MultimodalDLM | LoraAdapter:
    """The model of a `.ckpt`, or the adapter that alone was trained, if it is not merged."""
    saved = read(checkpoint)
    base = Base.of(saved)
    if base is not None and not merge:
        return base.adapter(saved, Path(checkpoint))
    _check_merge(merge, base is None, checkpoint)
    return trained(checkpoint, saved) if base is None else merged(saved, Path(checkpoint))


def _write_adapter(adapter: LoraAdapter, out: Path, card: str | None) -> None:
    """Writes an adapter folder in place of what was there."""
    with replacing_folder(out) as new:
        adapter.write(new)
        if card is not None:
            (new / CARD).write_text(card, encoding="utf-8")
        if out.is_dir():
            keep_others(out, new)


def push(folder: str | Path, repository: str) -> str:
    """Uploads an exported folder to the Hugging Face hub; a new repository is private.

    Args:
        folder: model or adapter.
        repository: owner/name; made if it does not exist.
    Returns:
        the address of the upload.
    Raises:
        ValueError: the hub refuses it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        made = api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(folder_path=str(folder), repo_id=made.repo_id))
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise ValueError(
            f"{folder} is written, but the hub did not take it as {repository!r}: {error}; log in "
            "with hf auth login, or check the name (owner/name)"
        ) from error


def replaceable(out: str | Path) -> Path:
    """The real path of a folder that can be exchanged for another one.

    Raises:
        ValueError: it is the current folder or above it, or it is where a file system begins.
    """
    out = Path(os.path.realpath(out))
    if Path.cwd().is_relative_to(out):
        raise ValueError(f"{out} is the current folder or above it; give a new folder to write")
    if out.is_mount():
        raise ValueError(f"{out} is a mount point, which cannot be replaced; give a folder in it")
    return out


def _has_grown(model: MultimodalDLM, folder: Path) -> bool:
    """Whether an adapter gave the model of a folder more tokens."""
    if model.tokenizer is None:
        return False
    known = Tokenizer.from_folder(folder)
    return known is None or len(known) < len(model.tokenizer)


def copy_files(folder: Path, new: Path, vocabulary: bool = True) -> None:
    """Copies the source's vocabulary and card, and JSON files that say the same as the new ones.

    A tokenizer.json that stores truncation, padding or dropout is not copied.

    Args:
        folder: the source.
        new: where the model was written.
        vocabulary: also copy files of the vocabulary; False if the model has other tokens.
    """
    names = [n for n in (COPIED if vocabulary else (CARD,)) if not (new / n).exists()]
    names += [n for n in (CONFIG, *BESIDE) if (new / n).exists() and _same(folder / n, new / n)]
    if vocabulary and (folder / "tokenizer.json").is_file():
        said = read_json(folder / "tokenizer.json")
        state = (said.get("truncation"), said.get("padding"), said["model"].get("dropout"))
        names += [] if any(state) else ["tokenizer.json"]
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, new / name)


def _same(source: Path, written: Path) -> bool:
    """Whether a file holds the same JSON, and no byte order mark before it."""
    if not source.is_file() or source.read_bytes().startswith(codecs.BOM_UTF8):
        return False
    return read_json(source) == read_json(written)


def keep_others(old: Path, new: Path) -> None:
    """Puts what else lies in the folder to be replaced into the new one, as links where it can."""
    systems = discover.classes(SYSTEMS, System).values()
    patterns = (*REPLACED, *(place.path for system in systems for place in system.WEIGHTS))

    def ignore(folder: str, names: Collection[str]) -> list[str]:
        inside = new / Path(folder).relative_to(old)
        replaced = patterns if inside.is_dir() else ()  # of folders that were written
        return [
            name
            for name in names
            if (inside / name).is_file() or any(fnmatch(name, pattern) for pattern in replaced)
        ]

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # a file system without links
            shutil.copy2(source, target, follow_symlinks=False)

    shutil.copytree(old, new, symlinks=True, ignore=ignore, copy_function=link, dirs_exist_ok=True)


def opened(
    source: str | Path,
    out: Path,
    family: str | None,
    adapter: str | Path | None = None,
    dtype: str | None = None,
) -> tuple[MultimodalDLM, Path, str | None]:
    """The model of a folder, that folder, and the family that is left to write.

    The weights have their stored types. With an adapter they have the type that is written: a sum
    rounded to the stored type would differ from the model that was trained.

    Args:
        source: bundled name, folder or hub id.
        out: where it is written.
        family: see `export`.
        adapter: see `mmdlm.load`.
        dtype: see `export`.

    Raises:
        ValueError: it would be overwritten.
    """
    folder = find(source)
    if folder.resolve() == out:
        raise ValueError(f"{out} is the checkpoint itself; give another folder to write")
    own = "format" in read_json(folder / "config.json")
    options = {"family": None if own else family, "adapter": adapter}
    types = "stored" if adapter is None else dtype or "float32"
    model = load(folder, device="cpu", dtype=types, **options)
    return model, folder, family if own else None
