"""Checkpoints in the layouts they were published in: which family reads one, and what it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch

from mmdlm import discover
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Family
from mmdlm.loading.keymap import Place, Report, expand, prefix_of, resolve, shapes
from mmdlm.loading.overrides import override
from mmdlm.loading.shards import Stored
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer

FAMILIES = "mmdlm.backbones"


def family_of(config: dict[str, Any], names: set[str], name: str | None) -> type[Family]:
    """The family that reads a published checkpoint.

    Args:
        config: config.json.
        names: the checkpoint's tensors.
        name: family asked for; None to find it.

    Raises:
        ValueError: no family fits, or more than one.
    """
    if config.get("quantization_config"):
        raise ValueError("quantised checkpoints are not read; take the bfloat16 one")
    if name is not None:
        return discover.find(FAMILIES, name, Family)
    known = discover.classes(FAMILIES, Family)
    fitting = [family for family in known.values() if family.matches(config, names)]
    # A family that builds on another one is the closer description.
    fitting = [f for f in fitting if not any(f in other.__mro__[1:] for other in fitting)]
    if len(fitting) == 1:
        return fitting[0]
    supported = ", ".join(discover.names(FAMILIES, Family))
    model_type = config.get("model_type")
    seen = (
        f"architectures {config.get('architectures')}, model_type {model_type!r}, "
        f"tensors such as {', '.join(sorted(names)[:3])}"
    )
    if fitting:
        both = " and ".join(family.__name__ for family in fitting)
        raise ValueError(f"{both} both fit {seen}; choose with family=, one of {supported}")
    asked = sorted(_file(family) for family in known.values() if model_type in family.ON_REQUEST)
    if asked:
        near = (
            f"{model_type!r} is the type of an autoregressive model; if this one was trained to "
            f"denoise, give family={' or family='.join(map(repr, asked))}"
        )
    else:
        near = (
            f"Nearest is {_nearest(config, names, known.values())!r}; if it is that, or another "
            "one under a new name, give it as family="
        )
    raise ValueError(f"no family fits {seen}. {near}. Supported: {supported}")


def _file(family: type[Family]) -> str:
    """Name of the file a family is in."""
    return family.__module__.rpartition(".")[2]


def _plain(name: Any) -> str:
    """A name without its capitals and separators."""
    return re.sub(r"[^a-z0-9]", "", str(name or "").lower())


def _nearest(config: dict[str, Any], names: set[str], known: Iterable[type[Family]]) -> str:
    """The family whose name and tensors' names are most like a checkpoint's."""
    called = [*(config.get("architectures") or ()), config.get("model_type")]
    # Layers and experts are alike, so the first of each stands for all.
    seen = {re.sub(r"(?<=\.)\d+(?=\.)", "0", name) for name in names}

    def likeness(family: type[Family]) -> float:
        published = [to if isinstance(to, tuple) else (to,) for to in family.KEYS.values() if to]
        table = {re.sub(r"\{\w\}", "0", name) for parts in published for name in parts}
        fitting = sum(any(f".{name}".endswith(f".{entry}") for entry in table) for name in seen)
        own = _plain(_file(family))
        alike = max(len(commonprefix((own, _plain(name)))) for name in called)
        return fitting / max(len(seen), 1) + alike / len(own)

    return _file(max(known, key=likeness))


def build(
    folder: Path,
    config: dict[str, Any],
    stored: dict[str, Stored],
    name: str | None,
    overrides: dict[str, Any],
) -> tuple[MultimodalDLM, dict[str, Place], Report]:
    """The model of a published folder on the meta device, and where its tensors go."""
    family = family_of(config, set(stored), name)
    # A family that knows no mask id would refuse a config that names none.
    given = {"mask_token_id": overrides["mask_id"]} if "mask_id" in overrides else {}
    spec = override(family.read(config | given, set(stored)), overrides)
    tokenizer = Tokenizer.from_folder(folder)
    with torch.device("meta"):
        model = MultimodalDLM(spec, tokenizer=tokenizer)
    ours = {f"backbone.{name}": shape for name, shape in shapes(model.backbone).items()}
    keys = {key if to is None else f"backbone.{key}": to for key, to in family.KEYS.items()}
    places = expand(keys, ours, rows(spec.transformer))
    unused = {}
    if spec.transformer.tied and isinstance(head := family.KEYS.get("out.weight"), str):
        unused[head] = "the head is tied to the embedding, which wins"
    prefix = prefix_of(stored, str(family.KEYS["embed.weight"]))
    return model, *resolve(stored, places, keys, prefix, unused)


def rows(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Lengths of stacked parts that are not equal."""
    q, kv = config.heads * config.head_width, config.keys_heads * config.head_width
    return {"attn.qkv.": (q, kv, kv)}


def kept(family: str) -> tuple[str, ...]:
    """Ends of backbone names that stay float32; none for a family of no file."""
    if family not in discover.names(FAMILIES, Family):
        return ()
    return discover.find(FAMILIES, family, Family).FLOAT32
