"""VisionZip: keep dominant tokens, merge the others into a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from adapters.pruner import Pruned, Pruner, Seen, in_order
from encoders.checks import UnitFloat


@dataclass(frozen=True)
class VisionZip(Pruner):
    """Keeps the tokens that receive most attention, and merges the others into a few.

    Of the others, evenly spaced ones are targets; each of the rest is averaged into the target
    whose attention keys are most like its own. The kept tokens come first, then the merged ones.
    The published code ranks by the attention of the class token; towers without one, such as
    SigLIP, rank by the attention received. It works on the tower's output, before the projector;
    here on what follows it.

    Source: VisionZip (arXiv 2412.04467; dvlab-research/VisionZip: visionzip/clip_encoder.py).

    Args:
        contextual: share of the kept tokens that are merged ones; 10 of 64 in the paper.
    """

    needs_attention: ClassVar[bool] = True

    contextual: UnitFloat = 10 / 64

    def merge(self, seen: Seen, count: int) -> Pruned:
        """See `Pruner.merge`; the published order, dominant before merged tokens, if renumbered."""
        merged = min(count - 1, round(self.contextual * count))
        found = zipped(seen.tokens, seen.received, seen.keys, count - merged, merged)
        return found if self.renumber else in_order(found)


def zipped(
    tokens: Tensor, importance: Tensor, keys: Tensor, dominant: int, contextual: int
) -> Pruned:
    """The dominant tokens of N and those that the others are merged into, see `VisionZip`.

    Args:
        tokens: [N D].
        importance: [N], by which the dominant ones are chosen.
        keys: [N C], by which the others are compared.
        dominant: tokens kept as they are, in their order.
        contextual: tokens that the others are merged into; at most N - dominant.
    """
    first = importance.topk(dominant).indices.sort().values
    others = torch.ones_like(importance, dtype=torch.bool).index_fill(0, first, False)
    rest, keys = tokens[others], functional.normalize(keys[others].float(), dim=-1)
    if not contextual or not len(rest):
        return Pruned(tokens[first], first)
    step = max(1, len(rest) // contextual)
    target = torch.arange(0, len(rest), step, device=tokens.device)[:contextual]
    moving = torch.ones(len(rest), dtype=torch.bool, device=tokens.device)
    moving[target] = False
    nearest = (keys[moving] @ keys[target].T).argmax(1)  # of each token that is merged
    sums = torch.zeros(len(target), tokens.shape[1], device=tokens.device)
    sums.index_add_(0, nearest, rest[moving].float())
    counts = torch.bincount(nearest, minlength=len(target)).clamp_min(1)[:, None]
    merged = rest[target] + (sums / counts).to(tokens.dtype)
    places = torch.cat([first, others.nonzero()[:, 0][target]])
    return Pruned(torch.cat([tokens[first], merged]), places)
