"""LoRA adapters merged into the weights while a model is loaded.

Tensors are found under our names, such as `backbone.blocks.0.attn.qkv.lora_A.weight`, or under
those of the published layout: `model.layers.0.self_attn.q_proj.lora_A.weight` changes the rows of
our fused projection that hold the queries.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmdlm import discover
from mmdlm.backbones.family import Family
from mmdlm.backbones.transformer import Transformer
from mmdlm.blueprint import Blueprint
from mmdlm.files import blaming, preview
from mmdlm.loading.contents import Contents
from mmdlm.loading.keymap import Place, Places, Table, expand, locate, shapes, tensors
from mmdlm.loading.lora import CONFIG, WEIGHTS, LoraAdapter
from mmdlm.loading.published import FAMILIES, SYSTEMS
from mmdlm.model import MultimodalDLM
from mmdlm.systems.system import System

EMBEDDING, HEAD = "backbone.embed.weight", "backbone.out.weight"
# Ends of peft's names, and which part of a change the tensor is. The rest are whole tensors.
PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
}


@dataclass(frozen=True)
class LowRank:
    """A product of two narrow matrices that is added to a weight, as in LoRA and DoRA.

    Args:
        place: the weight, or the part of it.
        a: [r, inputs], or a convolution's [r, inputs, ...].
        b: [outputs, r].
        scale: factor on the product.
        magnitude: [outputs] length of each row of the sum (DoRA); None to keep the sum.
    """

    place: Place
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def apply(self, weight: Tensor) -> None:
        """Changes a weight in place; computed in float32."""
        a, b = (each.to(weight.device, torch.float32).flatten(1) for each in (self.a, self.b))
        new = weight.float() + self.scale * (b @ a).view(weight.shape)
        if self.magnitude is not None:
            lengths = self.magnitude.to(new) / torch.linalg.norm(new, dim=1)
            new = new * lengths[:, None]
        weight.copy_(new)


@dataclass(frozen=True)
class Rows:
    """Rows of a weight that are replaced.

    Args:
        place: the weight, or the part of it.
        values: the new rows.
        at: their indices; None for all.
    """

    place: Place
    values: Tensor
    at: tuple[int, ...] | None = None

    def apply(self, weight: Tensor) -> None:
        """Changes a weight in place."""
        values = self.values.to(weight)
        if self.at is None:
            weight.copy_(values)
        else:
            weight[torch.tensor(self.at, device=weight.device)] = values


class Changes:
    """Everything an adapter changes.

    Args:
        found: one or more changes per tensor of the model.
    """

    def __init__(self, found: Iterable[LowRank | Rows]) -> None:
        self.of: dict[str, list[LowRank | Rows]] = defaultdict(list)
        for each in found:
            self.of[each.place.ours].append(each)

    def apply(self, model: MultimodalDLM, prefix: str) -> None:
        """Changes the weights of a part of a model, once they are read.

        Args:
            model: its weights.
            prefix: start of the names of the part's tensors.
        """
        wanted = [name for name in self.of if name.startswith(prefix)]
        held = tensors(model) if wanted else {}
        for name in wanted:
            for each in self.of[name]:
                if not held[name].is_meta:
                    each.apply(held[name][each.place.index])


def attach(
    adapter: LoraAdapter, model: MultimodalDLM, contents: Contents, places: Places
) -> tuple[Places, Changes]:
    """Prepares a model whose weights are not read yet for this adapter.

    The vocabulary, tokenizer, defaults and statistics become the adapter's.

    Args:
        adapter: what to merge.
        model: on the meta device.
        contents: the folder it is read from.
        places: where the tensors of that folder belong.
    Returns:
        where they belong now, and the changes to apply when they are read.
    Raises:
        ValueError: a setting is not supported, or a tensor does not fit the model.
    """
    with blaming(adapter.source):
        adapter.check()
        entries = _entries(adapter)
        known = {**_published(model, contents, places), **expand(None, shapes(model))}
        rows = _vocabulary(adapter, entries, known)
        before = model.spec.transformer.vocab
        if rows > before:
            _widen(model, rows)
            places = {name: _first_rows(place, before) for name, place in places.items()}
            known = {name: _resized(place, before, rows) for name, place in known.items()}
        changes = [_change(adapter, name, parts, known) for name, parts in entries.items()]
        _check_new_rows(model, changes, before)
        _use_tokenizer(adapter, model)
        adapter.set_outputs(model)
    model.preset = adapter.tasks or model.preset
    return places, Changes(changes)


def _entries(adapter: LoraAdapter) -> dict[str, dict[str, Tensor]]:
    """The parts of each change by the name of the tensor that is changed."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in adapter.tensors.items():
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        end = next((end for end in PARTS if name.endswith(end)), None)
        if end is not None:
            found[name.removesuffix(end) + ".weight"][PARTS[end]] = tensor
        elif ".lora_" in name:
            raise ValueError(f"{name} is not a tensor of LoRA that mmdlm knows")
        else:
            found[name]["whole"] = tensor
    if not found:
        raise ValueError(f"{WEIGHTS} holds no tensors")
    return found


def _change(
    adapter: LoraAdapter, name: str, parts: Mapping[str, Tensor], known: Mapping[str, Place]
) -> LowRank | Rows:
    """What a group of tensors does to the model.

    Raises:
        ValueError: the tensors do not fit.
    """
    place = _find(name, known)
    if "whole" in parts:
        _check_shape(name, parts["whole"], place.shape)
        return Rows(place, parts["whole"])
    if "rows" in parts:
        at = _indices(adapter, name)
        _check_shape(name, parts["rows"], (len(at), *place.shape[1:]))
        return Rows(place, parts["rows"], at)
    return _low_rank(adapter, name, parts, place)


def _low_rank(
    adapter: LoraAdapter, name: str, parts: Mapping[str, Tensor], place: Place
) -> LowRank:
    """The product of the two matrices of a name, checked against the settings."""
    module = name.removesuffix(".weight")
    if "embedding_a" in parts and "embedding_b" in parts:
        if adapter.settings.get("use_dora"):
            raise ValueError(f"{module}: DoRA of an embedding is not supported")
        a, b = parts["embedding_b"].T, parts["embedding_a"].T
    elif "a" in parts and "b" in parts:
        a, b = parts["a"], parts["b"]
    else:
        raise ValueError(f"{module} has {preview(sorted(parts))} only, expected lora_A and lora_B")
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError(f"{module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}")
    rank = _setting(adapter.settings.get("rank_pattern"), module, adapter.settings.get("r"))
    if not len(a) == b.shape[1] == rank:
        raise ValueError(
            f"{module}: lora_A has rank {len(a)} and lora_B {b.shape[1]}, {CONFIG} says {rank}"
        )
    _check_shape(f"{module}.lora_A", a, (rank, *place.shape[1:]))
    _check_shape(f"{module}.lora_B", b, (place.shape[0], rank, *[1] * (b.ndim - 2)))
    alpha = _setting(adapter.settings.get("alpha_pattern"), module, adapter.settings["lora_alpha"])
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or not rank:
        raise ValueError(
            f"{module}: lora_alpha is {alpha!r} and the rank {rank}, expected a number and a rank "
            "of at least 1"
        )
    scale = alpha / (math.sqrt(rank) if adapter.settings.get("use_rslora") else rank)
    magnitude = parts.get("magnitude")
    if (magnitude is not None) != bool(adapter.settings.get("use_dora")):
        seen = "no" if magnitude is None else "a"
        raise ValueError(
            f"{module} has {seen} lora_magnitude_vector, but use_dora is "
            f"{adapter.settings.get('use_dora')!r} in {CONFIG}"
        )
    if magnitude is not None:
        if len(place.shape) != 2:
            raise ValueError(f"{module}: DoRA of a convolution is not supported")
        _check_shape(f"{module}.lora_magnitude_vector", magnitude, place.shape[:1])
    return LowRank(place, a, b, scale, magnitude)


def _indices(adapter: LoraAdapter, name: str) -> tuple[int, ...]:
    """The rows that trainable_token_indices names for an embedding or a head."""
    given = adapter.settings.get("trainable_token_indices")
    if isinstance(given, Mapping):
        module = f".{name.removesuffix('.weight')}"
        given = next((at for key, at in given.items() if module.endswith(f".{key}")), None)
    if not isinstance(given, list) or not all(isinstance(i, int) and i >= 0 for i in given):
        raise ValueError(
            f"{CONFIG}: trainable_token_indices is {given!r} for {name}, expected token ids"
        )
    return tuple(given)


def _vocabulary(
    adapter: LoraAdapter, entries: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, Place]
) -> int:
    """Rows that embedding and head need."""
    needed = [0]
    for name, parts in entries.items():
        if _find(name, known).ours not in (EMBEDDING, HEAD):
            continue
        if "whole" in parts:
            needed.append(len(parts["whole"]))
        elif "rows" in parts:
            needed.append(max(_indices(adapter, name), default=-1) + 1)
    return max(needed)


def _use_tokenizer(adapter: LoraAdapter, model: MultimodalDLM) -> None:
    """Gives the model the adapter's tokenizer where that has more tokens.

    Raises:
        ValueError: the two give a token different ids, or there are tokens without a row.
    """
    if adapter.tokenizer is None:
        return
    ours = adapter.tokenizer.backend.get_vocab()
    known = {} if model.tokenizer is None else model.tokenizer.backend.get_vocab()
    if differ := [token for token, i in known.items() if ours.get(token, i) != i]:
        raise ValueError(
            f"token {differ[0]!r} has id {ours[differ[0]]} in the adapter's tokenizer and "
            f"{known[differ[0]]} in the model's; the adapter is of another model"
        )
    rows = model.spec.transformer.vocab
    if max(ours.values(), default=-1) >= rows:
        raise ValueError(
            f"its tokenizer has {len(ours)} tokens, but the embedding has {rows} rows with "
            "this adapter; it is of another model"
        )
    if ours.keys() > known.keys():
        model.tokenizer = adapter.tokenizer


def _setting(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in peft."""
    try:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    except re.error as error:
        raise ValueError(
            f"{CONFIG}: {pattern!r} is not a valid regular expression ({error})"
        ) from error
    return default


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} is {list(tensor.shape)}, expected {list(expected)} for this model; the "
            "adapter is of another model, or its rank is not that of its config"
        )


def _find(name: str, known: Mapping[str, Place]) -> Place:
    """The place of a tensor, also where one of the two names has a prefix more.

    Raises:
        ValueError: there is none, or more than one.
    """
    if name in known:
        return known[name]
    fitting = [k for k in known if k.endswith(f".{name}") or name.endswith(f".{k}")]
    if len(fitting) != 1:
        seen = f"fits {preview(fitting)} alike" if fitting else "is not a tensor of this model"
        raise ValueError(
            f"{name} {seen}; expected names such as {preview(sorted(known)[:2])}. The adapter is "
            "of another model"
        )
    return known[fitting[0]]


def _published(model: MultimodalDLM, contents: Contents, places: Places) -> Mapping[str, Place]:
    """The places of a model's weights by published name."""
    if contents.tables is not None:
        return places
    tables = _tables(contents.blueprint)
    ours = {n: shape for n, shape in shapes(model).items() if n.startswith(tuple(tables))}
    return locate(ours, tables, model.spec.transformer) if tables else {}


def _tables(blueprint: Blueprint) -> dict[str, Table]:
    """Published names by part of a model in our own layout; none if it was never published."""
    if blueprint.system is not None:
        return discover.find(SYSTEMS, blueprint.system, System).keys(blueprint)
    if blueprint.spec.family in discover.names(FAMILIES, Family):
        keys = discover.find(FAMILIES, blueprint.spec.family, Family).KEYS
        return {"backbone": ("", keys)}
    return {}


def _widen(model: MultimodalDLM, rows: int) -> None:
    """Gives embedding and head of a model on the meta device more rows."""
    config = replace(model.spec.transformer, vocab=rows)
    with torch.device("meta"):
        fresh = Transformer(config)
    backbone = model.backbone
    backbone.embed, backbone.out, backbone.config = fresh.embed, fresh.out, config
    model.spec = replace(model.spec, transformer=config)


def _is_vocabulary(place: Place) -> bool:
    return place.ours.startswith(("backbone.embed.", "backbone.out.")) and place.index == ()


def _first_rows(place: Place, rows: int) -> Place:
    """The place of a stored tensor after the vocabulary has grown."""
    return replace(place, index=(slice(0, rows),)) if _is_vocabulary(place) else place


def _resized(place: Place, before: int, rows: int) -> Place:
    """The place of a tensor of the adapter after the vocabulary has grown."""
    if not _is_vocabulary(place) or place.shape[0] != before:
        return place
    return replace(place, shape=(rows, *place.shape[1:]))


def _check_new_rows(model: MultimodalDLM, changes: Iterable[LowRank | Rows], before: int) -> None:
    """Raises unless every row that the checkpoint has not is given by the adapter."""
    rows = model.spec.transformer.vocab
    if rows == before:
        return
    given: dict[str, set[int]] = defaultdict(set)
    for each in changes:
        if isinstance(each, Rows):
            at = range(rows) if each.at is None else each.at
            given[each.place.ours] |= {i for i in at if i >= before}
    for name in shapes(model):
        is_vocabulary = name.startswith(("backbone.embed.", "backbone.out."))
        if is_vocabulary and len(given[name]) < rows - before:
            first = next(i for i in range(before, rows) if i not in given[name])
            raise ValueError(
                f"it has {rows} tokens and the model {before}, but it lacks row {first} of {name}"
            )
