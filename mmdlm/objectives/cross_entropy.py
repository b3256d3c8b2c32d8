"""Cross entropy of chosen tokens without the logits of all of them at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from mmdlm.layout import Sequence
    from mmdlm.model import MultimodalDLM


class Scores(NamedTuple):
    """How well N tokens are predicted.

    Args:
        losses: [N] float32 cross entropy, with gradient.
        right: [N] float32, 1 where the most probable token is the target.
    """

    losses: Tensor
    right: Tensor


def cross_entropy(
    model: MultimodalDLM, sequence: Sequence, at: Tensor, target: Tensor, chunk: int
) -> Scores:
    """Cross entropy of the tokens at some positions, computed `chunk` positions at a time.

    At most [chunk V] logits exist at a time: the backward pass computes them again, chunk by chunk.
    If all positions fit into one chunk, its logits are kept and nothing is computed twice. With
    V = 126,464 the float32 logits of 4,096 positions take 2 GB, and as much for each copy.

    Args:
        model: the model that scores.
        sequence: input of the model.
        at: bool [B L], N positions whose tokens are predicted.
        target: int64 [N], their tokens, sequence by sequence.
        chunk: positions per chunk.
    """
    hidden = model.hidden_at(sequence, at)  # [N D]
    if len(hidden) <= chunk or not torch.is_grad_enabled():
        parts = [
            _scores(model, part, tokens)
            for part, tokens in zip(hidden.split(chunk), target.split(chunk), strict=True)
        ]
    else:
        parts = [
            checkpoint(_scores, model, part, tokens, use_reentrant=False)
            for part, tokens in zip(hidden.split(chunk), target.split(chunk), strict=True)
        ]
    losses, right = (torch.cat(each) for each in zip(*parts, strict=True))
    return Scores(losses, right)


def _scores(model: MultimodalDLM, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and hits of a chunk, see `Scores`; hidden is [N D]."""
    logits = model.backbone.head(hidden).float()
    losses = F.cross_entropy(logits, target, reduction="none")
    return losses, (logits.detach().argmax(-1) == target).float()
