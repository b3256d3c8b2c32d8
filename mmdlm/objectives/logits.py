"""Any function of the logits of chosen tokens, without the logits of all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from mmdlm.layout import Sequence
    from mmdlm.model import MultimodalDLM

Measure = Callable[..., tuple[Tensor, ...]]


def measured(
    model: MultimodalDLM,
    sequence: Sequence,
    at: Tensor,
    chunk: int,
    measure: Measure,
    *given: Tensor,
) -> tuple[Tensor, ...]:
    """Values [N] of each token, computed `chunk` positions at a time.

    At most [chunk V] logits exist at a time: the backward pass computes them again.
    `mmdlm.objectives.cross_entropy` is the faster way to a cross entropy.

    Args:
        model: the model that scores.
        sequence: input of the model.
        at: bool [B L], N positions.
        chunk: positions per chunk.
        measure: maps float32 logits [n V] and n entries of each of `given` to tensors [n].
        given: each [N ...], position by position.
    """

    def part(hidden: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        return measure(model.backbone.head(hidden).float(), *own)

    hidden = model.hidden_at(sequence, at)
    chunks = zip(*(x.split(chunk) for x in (hidden, *given)), strict=True)
    if len(hidden) <= chunk or not torch.is_grad_enabled():
        parts = [part(*each) for each in chunks]
    else:
        parts = [checkpoint(part, *each, use_reentrant=False) for each in chunks]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))
