"""Vectors of what a sequence holds, for embeddings and retrieval."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.layout import PROMPT, Sequence, append_answer, levels
from mmdlm.model import MultimodalDLM

Pooling = Literal["mean", "text", "last", "masks"]
"""How the vectors of a row are computed from its final hidden states.

"mean": mean over all real tokens. "text": mean over the text tokens; over all tokens of a row
without text. "last": the last token. "masks": one vector for each appended mask token
(representative tokens, DiffRetriever)."""


def vectors(model: MultimodalDLM, sequence: Sequence, pooling: Pooling = "mean") -> Tensor:
    """Unit-length vectors [B K D] float32 of each row; K is 1 unless pooling is "masks".

    Args:
        model: the model.
        sequence: rows; with "masks", their answers are the K masks.
        pooling: see `Pooling`.
    """
    hidden = model.hidden(sequence).float()  # [B L D]
    if pooling == "masks":
        found = hidden[sequence.is_answer].unflatten(0, (len(hidden), -1))
    elif pooling == "last":
        last = sequence.mask.shape[1] - 1 - sequence.mask.flip(1).int().argmax(1)
        found = hidden[torch.arange(len(hidden), device=hidden.device), last][:, None]
    else:
        taken = sequence.mask
        if pooling == "text":
            text = taken & ~sequence.is_medium
            taken = torch.where(text.any(1, keepdim=True), text, taken)
        found = (hidden * taken[..., None]).sum(1, keepdim=True)  # the length does not matter
    return F.normalize(found, dim=-1)


def sparse(model: MultimodalDLM, sequence: Sequence) -> Tensor:
    """Term weights [B V] float32 of rows whose answers are K masks.

    The largest log(1 + relu(logit)) over the masks; zero for special tokens. Source: DiffRetriever.

    Args:
        model: the model.
        sequence: rows with masks.
    """
    logits = model.logits_at(sequence, sequence.is_answer).float()  # [B*K V]
    weights = logits.relu().log1p().unflatten(0, (len(sequence.tokens), -1)).amax(1)
    spec = model.spec
    special = [i for i in (spec.mask_id, spec.eos_id, spec.pad_id, *spec.stop_ids) if i is not None]
    keep = torch.ones(weights.shape[1], device=weights.device)
    keep[special] = 0
    return weights * keep


def similarity(queries: Tensor, documents: Tensor) -> Tensor:
    """[N M] cosines of vectors; of several, the mean over those of the query of the best match.

    Args:
        queries: [N K D] of unit length.
        documents: [M J D] of unit length.
    """
    scores = torch.einsum("nkd,mjd->nmkj", queries, documents)
    return scores.amax(3).mean(2)


def with_masks(model: MultimodalDLM, sequence: Sequence, count: int) -> Sequence:
    """The rows without answers, followed by masks in their place.

    Args:
        model: the model.
        sequence: rows; what is not real may be anywhere in them.
        count: masks per row.
    """
    masks = sequence.tokens.new_full((len(sequence.tokens), count), model.spec.mask_id)
    return append_answer(model.spec, sequence, masks)


def part(model: MultimodalDLM, sequence: Sequence, answers: bool) -> Sequence:
    """The prompts or the answers of rows as sequences of their own, as prompts.

    Args:
        model: the model.
        sequence: prompts with answers.
        answers: the answers, up to their first end token, whose positions begin at 0 again.
    """
    spec, mask = model.spec, sequence.mask & ~sequence.is_answer
    positions = sequence.positions
    if answers:
        ends = torch.tensor([spec.eos_id, *spec.stop_ids], device=mask.device)
        ended = (torch.isin(sequence.tokens, ends) & sequence.is_answer).cumsum(1) > 0
        mask = sequence.is_answer & ~ended
        first = positions.masked_fill(~mask, 2**62).amin(1, keepdim=True)
        positions = (positions - first).clamp(min=0)
    role, order = torch.full_like(sequence.role, PROMPT), torch.zeros_like(positions)
    level = levels(role, sequence.source, positions, order, spec.attention, spec.block_size)
    return replace(sequence, mask=mask, role=role, positions=positions, level=level, branch=None)
