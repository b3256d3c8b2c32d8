"""LLaVA-PruMerge: keep outliers of the attention and merge into them what is like them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from adapters.pruner import Pruned, Pruner, Seen, in_order
from encoders.checks import PositiveInt


@dataclass(frozen=True)
class PruMerge(Pruner):
    """Keeps the tokens that receive most attention; similar tokens are added to them.

    To each kept token, its most similar tokens by attention key are added, weighted by the
    attention they receive. One more token, the weighted sum of all that were not kept, comes last.
    Attention is that of the tower's class token in the published code; towers without one use the
    attention received.

    Source: LLaVA-PruMerge (arXiv 2403.15388; 42Shawn/LLaVA-PruMerge:
    llava/model/multimodal_encoder/clip_encoder.py).

    Args:
        adaptive: the number of tokens is that of the outliers, those above the third quartile by
            more than 1.5 interquartile ranges, at most `keep`; an image decides how many it needs.
        spread: PruMerge+: evenly spaced tokens are kept too, as many as outliers.
        neighbours: similar tokens that are added to each kept one.
    """

    needs_attention: ClassVar[bool] = True

    adaptive: bool = False
    spread: bool = False
    neighbours: PositiveInt = 32

    def merge(self, seen: Seen, count: int) -> Pruned:
        """See `Pruner.merge`; the last token stands for those that were dropped."""
        if self.adaptive:
            count = min(count, 1 + outliers(seen.received))
        kept = max(1, count - 1)
        if self.spread:
            kept = max(1, kept // 2)
        chosen = seen.received.topk(kept).indices
        if (even := count - 1 - kept) > 0:
            spaced = (torch.arange(even) + 0.5) * (len(seen.tokens) / even)
            chosen = torch.cat([chosen, spaced.long().to(chosen.device)]).unique()
        found = prumerged(seen.tokens, seen.received, seen.keys, chosen, self.neighbours)
        return found if self.renumber else in_order(found)


def outliers(scores: Tensor) -> int:
    """Scores above the third quartile by more than 1.5 interquartile ranges."""
    low, high = scores.float().quantile(torch.tensor([0.25, 0.75], device=scores.device))
    return int((scores > high + 1.5 * (high - low)).sum())


def prumerged(
    tokens: Tensor, scores: Tensor, keys: Tensor, chosen: Tensor, neighbours: int
) -> Pruned:
    """The K chosen tokens with what was merged into them, and the sum of the others, the last.

    Args:
        tokens: [N D].
        scores: [N] weights of the tokens that are merged.
        keys: [N C], by which they are compared.
        chosen: [K] indices of the kept tokens.
        neighbours: similar tokens that are added to each kept one, kept ones too.
    """
    unit = functional.normalize(keys.float(), dim=-1)
    near = unit[chosen] @ unit.T  # [K N]
    near.scatter_(1, chosen[:, None], -torch.inf)  # never itself
    most = min(neighbours, len(tokens) - 1)
    at = near.topk(most, dim=1).indices  # [K M]
    added = (scores[at][..., None] * tokens[at]).sum(1)
    dropped = torch.ones_like(scores, dtype=torch.bool).index_fill(0, chosen, False)
    extra = (scores[dropped][:, None] * tokens[dropped]).sum(0, keepdim=True)
    last = torch.full_like(chosen[:1], len(tokens) - 1)
    return Pruned(torch.cat([tokens[chosen] + added, extra]), torch.cat([chosen, last]))
