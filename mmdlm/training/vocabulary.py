"""More words for a model with a vocabulary of whole words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmdlm import word_list
from mmdlm.backbones.transformer import embedding
from mmdlm.model import MultimodalDLM


def grow(model: MultimodalDLM, words: Iterable[str]) -> list[str]:
    """Adds the words that a model lacks to its vocabulary, embedding and head.

    A word that exists in lower case starts from that row, any other from the mean of all rows.
    Models with a subword tokenizer encode any text and stay unchanged.

    Args:
        model: changed in place.
        words: of the data, see `word_list.pieces`.
    Returns:
        the new words.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.words is None:
        return []
    new = word_list.missing(words, tokenizer.words)
    if not new:
        return []
    known = tokenizer.words
    sources = [known.get(word.lower()) for word in new]
    backbone = model.backbone
    backbone.embed = _embedding(backbone.embed, sources)
    if backbone.out is not None:
        _widen(backbone.out, sources)
    model.tokenizer = tokenizer.grown(new)
    config = replace(model.spec.transformer, vocab=len(model.tokenizer))
    backbone.config = config
    model.spec = replace(model.spec, transformer=config)
    return new


def _embedding(old: nn.Embedding, sources: list[int | None]) -> nn.Embedding:
    """The embedding with one row more per source, on the same device and in the same dtype."""
    rows = _rows(old.weight, sources)
    new = embedding(len(rows), rows.shape[1]).to(rows)
    with torch.no_grad():
        new.weight.copy_(rows)
    return new.requires_grad_(old.weight.requires_grad)


def _widen(linear: nn.Linear, sources: list[int | None]) -> None:
    """Adds one output per source to a linear layer, in place."""
    linear.weight = nn.Parameter(_rows(linear.weight, sources))
    if linear.bias is not None:
        linear.bias = nn.Parameter(_rows(linear.bias, sources))
    linear.out_features = len(linear.weight)


def _rows(old: Tensor, sources: list[int | None]) -> Tensor:
    """[V + n ...] rows of [V ...], then a copy of each source's row, the mean where it is None."""
    old = old.detach()
    mean = old.mean(0)
    return torch.cat([old, torch.stack([mean if i is None else old[i] for i in sources])])
