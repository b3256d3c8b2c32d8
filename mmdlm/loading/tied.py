"""Checkpoints whose config.json ties the head to the embedding and whose files hold both."""

from __future__ import annotations

import warnings
from dataclasses import replace
from math import prod

import torch

from mmdlm.loading.contents import Contents
from mmdlm.loading.shards import CHUNK, TYPES, Stored, copy


def untie(contents: Contents) -> Contents:
    """The contents with a head of its own where the stored head differs from the embedding.

    Transformers 5 does the same (`PreTrainedModel.tie_weights`): the weights are what was trained,
    config.json is what is wrong.
    """
    spec = contents.blueprint.spec
    names = [contents.published_name(ours) for ours in ("embed.weight", "out.weight")]
    embedding, head = (contents.stored.get(name) for name in names)
    if not spec.transformer.tied or embedding is None or head is None or equal(embedding, head):
        return contents
    warnings.warn(
        f"{head.file.parent}: config.json ties the head to the embedding, but {names[1]} and "
        f"{names[0]} have different values; the stored head is used, as in transformers 5. Set "
        "tie_word_embeddings (LLaDA: weight_tying) to false in config.json to silence this",
        stacklevel=2,
    )
    transformer = replace(spec.transformer, tied=False)
    blueprint = replace(contents.blueprint, spec=replace(spec, transformer=transformer))
    return replace(contents, blueprint=blueprint)


def equal(a: Stored, b: Stored) -> bool:
    """Whether two stored tensors have equal values; a chunk of each is in memory at a time."""
    if a.shape != b.shape or not {a.dtype, b.dtype} <= TYPES.keys():
        return False
    left = prod(a.shape)
    done, size = 0, CHUNK // 4
    while done < left:
        count = min(size, left - done)
        parts = {name: _part(each, done, count) for name, each in (("a", a), ("b", b))}
        read = {name: torch.empty(count) for name in parts}
        copy(parts, read)
        if not torch.equal(read["a"], read["b"]):
            return False
        done += count
    return True


def _part(stored: Stored, start: int, count: int) -> Stored:
    """Consecutive numbers of a stored tensor."""
    size = TYPES[stored.dtype].itemsize
    return replace(stored, shape=(count,), start=stored.start + start * size)
