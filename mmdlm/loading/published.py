"""Checkpoints in the layouts they were published in: which family or system reads one.

A multimodal one is a `System` of `mmdlm.systems`; any other is a language model alone, a `Family`
of `mmdlm.backbones`, and becomes a blueprint without encoders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os.path import commonprefix
from pathlib import Path
from typing import Any

from mmdlm import discover
from mmdlm.backbones.family import Family
from mmdlm.blueprint import Blueprint
from mmdlm.chat import find as find_template
from mmdlm.files import preview
from mmdlm.loading import merged
from mmdlm.loading.contents import CONFIG, Contents
from mmdlm.loading.contents import beside as beside_config
from mmdlm.loading.keymap import Table, prefix_of
from mmdlm.loading.shards import Stored, index
from mmdlm.loading.special_ids import Sources, SpecialIds, gather
from mmdlm.loading.tied import untie
from mmdlm.systems.system import Beside, System, respelled
from mmdlm.text import Tokenizer

FAMILIES, SYSTEMS = "mmdlm.backbones", "mmdlm.systems"


def family_of(config: dict[str, Any], names: set[str], name: str | None) -> type[Family]:
    """The family that reads a published checkpoint.

    Args:
        config: config.json.
        names: the checkpoint's tensors.
        name: the user's choice; None to find it.

    Raises:
        ValueError: no family fits, or more than one.
    """
    if name is not None:
        return discover.find(FAMILIES, name, Family)
    known = discover.classes(FAMILIES, Family)
    fitting = _fitting(known, config, names)
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
    explicit = sorted(_file(family) for family in known.values() if model_type in family.ON_REQUEST)
    if explicit:
        near = (
            f"{model_type!r} is the type of an autoregressive model; if this one was trained to "
            f"denoise, give family={' or family='.join(map(repr, explicit))}"
        )
    else:
        near = (
            f"Nearest is {_nearest(config, names, known.values())!r}; if it is that, or another "
            "one under a new name, give it as family="
        )
    raise ValueError(f"no family fits {seen}. {near}. Supported: {supported}")


def system_of(config: dict[str, Any], names: set[str], name: str | None) -> type[System] | None:
    """The system that reads a published checkpoint, None where it is a language model alone.

    Args:
        config: config.json.
        names: the checkpoint's tensors.
        name: the user's choice, system or family; None to find it.

    Raises:
        ValueError: more than one system fits.
    """
    if name is not None:
        # Of a name that is both, such as llada_v, the family: the language model alone.
        there = name in {*discover.names(SYSTEMS, System)} - {*discover.names(FAMILIES, Family)}
        return discover.find(SYSTEMS, name, System) if there else None
    known = discover.classes(SYSTEMS, System).items()
    signed = {n: k for n, k in known if not k.SIGNS or _shows(k.SIGNS, config, names)}
    fitting = _fitting(signed, config, names)
    if len(fitting) > 1:
        both = " and ".join(map(_file, fitting))
        raise ValueError(f"systems {both} both fit this config.json; choose with family=")
    return fitting[0] if fitting else None


def _shows(signs: tuple[str, ...], config: dict[str, Any], names: set[str]) -> bool:
    """Whether config.json has one of these entries, or a tensor's name begins with one."""
    return any(sign in config for sign in signs) or any(name.startswith(signs) for name in names)


def _fitting(
    known: Mapping[str, type[Any]], config: dict[str, Any], names: set[str]
) -> list[type[Any]]:
    """Families or systems that match a checkpoint.

    Where config.json has one of the `TYPES` of some, only those are tried, and those without any.
    Of two of which one derives from the other, the derived one is the closer description.
    """
    named = [*(config.get("architectures") or ()), config.get("model_type")]
    called = {str(name).lower() for name in named}
    found = any(called & set(kind.TYPES) for kind in known.values())
    tried = [k for k in known.values() if not (found and k.TYPES) or called & set(k.TYPES)]
    fitting = [kind for kind in tried if kind.matches(config, names)]
    return [f for f in fitting if not any(f in other.__mro__[1:] for other in fitting)]


def _file(kind: type[Any]) -> str:
    """Name of the file a family or system is in."""
    return kind.__module__.rpartition(".")[2]


def _plain(name: Any) -> str:
    """A name without its capitals and separators."""
    return re.sub(r"[^a-z0-9]", "", str(name or "").lower())


def _nearest(config: dict[str, Any], names: set[str], known: Iterable[type[Family]]) -> str:
    """The family whose name and tensor names are most similar to a checkpoint's."""
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


def kept(family: str) -> tuple[str, ...]:
    """Ends of backbone names that stay float32; none for a family of no file."""
    if family not in discover.names(FAMILIES, Family):
        return ()
    return discover.find(FAMILIES, family, Family).FLOAT32


def read(
    folder: Path, config: dict[str, Any], name: str | None, given: Mapping[str, Any] | None = None
) -> Contents:
    """What a published folder holds.

    Args:
        folder: the checkpoint.
        config: its config.json.
        name: the user's choice, family or system; None to find it. A family reads the language
            model alone.
        given: overrides of `mmdlm.load`; the values they replace are not looked at.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: no family or system fits, or the checkpoint is not as it was published.
    """
    if config.get("quantization_config"):
        raise ValueError("quantized checkpoints are not read; use the bfloat16 one")
    tokenizer = Tokenizer.from_folder(folder)
    ids = gather(folder, config, tokenizer, given)
    system = system_of(config, set(), name)
    beside = () if system is None else _places(folder, config, system)
    own = {file.name for file in folder.glob("*.safetensors*")}
    stored = {} if beside and own <= {each.path for each in beside} else index(folder)
    system = system or system_of(config, set(stored), name)
    if system is None:
        return _read_family(ids, config, stored, name)
    stored |= _beside(folder, beside or _places(folder, config, system), stored)
    spelling = system.spelling(set(stored))
    stored = respelled(stored, {to: ours for ours, to in spelling.items()})
    files = beside_config(folder, system.FILES)
    blueprint = system.read(ids.complete(config) | files, set(stored))
    blueprint, sources = _settled(blueprint, ids)
    if tokenizer is None:  # that of the language model, where it is a checkpoint of its own
        prefix, _ = system.keys(blueprint)["backbone"]
        inside = [folder / each.path for each in beside if each.prefix.startswith(prefix or "/")]
        tokenizer = next(filter(None, map(Tokenizer.from_folder, inside)), None)
    if tokenizer is not None:
        blueprint = system.with_tokenizer(blueprint, tokenizer)
    blueprint = replace(blueprint, system=_file(system))
    tables = system.keys(blueprint)
    found = {"published": files | {CONFIG: config}, "sources": sources, "spelling": spelling}
    return _untied(Contents(blueprint, tokenizer, stored, tables, **found))


def _places(folder: Path, config: dict[str, Any], system: type[System]) -> tuple[Beside, ...]:
    """Where weights of a system may be besides the single file or the shards of a folder."""
    return (*system.WEIGHTS, *merged.find(folder, config, system.PARTS))


def _has_weights(folder: Path) -> bool:
    """Whether there is a safetensors file or an index in the folder itself."""
    return any(folder.glob("*.safetensors*"))


def _read_family(
    ids: SpecialIds, config: dict[str, Any], stored: dict[str, Stored], name: str | None
) -> Contents:
    """A text model: its family's spec in a blueprint without encoders."""
    family = family_of(config, set(stored), name)
    blueprint = Blueprint(family.read(ids.complete(config), set(stored)))
    blueprint, sources = _settled(blueprint, ids)
    prefix = prefix_of(stored, str(family.KEYS["embed.weight"]))
    tables: dict[str, Table] = {"backbone": (prefix, family.KEYS)}
    # A system's config.json does not describe the language model alone.
    own = {} if system_of(config, set(stored), None) else {CONFIG: config}
    found = {"published": beside_config(ids.folder) | own, "sources": sources}
    return _untied(Contents(blueprint, ids.tokenizer, stored, tables, prefix, **found))


def _untied(contents: Contents) -> Contents:
    """The contents, with a separate head where it is stored and differs from the embedding."""
    is_tied = contents.blueprint.spec.transformer.tied
    is_stored = is_tied and contents.published_name("out.weight") in contents.stored
    return untie(contents) if is_stored else contents


def _settled(blueprint: Blueprint, ids: SpecialIds) -> tuple[Blueprint, Sources]:
    """The blueprint with the special ids of all files, and where each is from."""
    name = ids.given.get("template", blueprint.spec.template)
    chat, tokenizer = blueprint.template.get("chat") or name, ids.tokenizer
    jinja = None if tokenizer is None else find_template(tokenizer, chat)
    spec, sources = ids.settle(blueprint.spec, jinja)
    return replace(blueprint, spec=spec), sources


def _beside(folder: Path, places: Iterable[Beside], stored: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors beside those of the folder itself.

    Raises:
        ValueError: a tensor is in the folder itself as well.
    """
    more: dict[str, Stored] = {}
    for beside in places:
        path = folder / beside.path
        if not (path.is_file() or _has_weights(path)):
            continue
        found = {beside.name(name): tensor for name, tensor in index(path).items()}
        if twice := sorted(found.keys() & (stored.keys() | more.keys())):
            raise ValueError(
                f"{folder}: {preview(twice)} are in {beside.path} and elsewhere too; keep one"
            )
        more |= found
    return more
