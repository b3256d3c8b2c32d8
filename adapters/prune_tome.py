"""ToMe: merge pairs of similar tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from adapters.pruner import Pruned, Pruner, Seen


@dataclass(frozen=True)
class ToMe(Pruner):
    """Merges the most similar pairs of tokens until about `keep` of them remain.

    Bipartite soft matching: tokens at even and at odd places form two sets; each even token is
    matched with the most similar odd one by its attention key, and the best pairs are averaged,
    weighted by how many tokens each one already stands for. A pass halves the tokens at most. The
    published code merges inside the blocks of the tower, see `adapters.prune_tome_tower.ToMeTower`;
    here the passes follow one another after the adapter, so that it serves every tower.

    Source: ToMe (arXiv 2210.09461; facebookresearch/ToMe: tome/merge.py).
    """

    needs_attention: ClassVar[bool] = True

    def merge(self, seen: Seen, count: int) -> Pruned:
        """See `Pruner.merge`; a merged token is at the place of the one others went into."""
        tokens, keys = seen.tokens.float(), seen.keys.float()
        places = torch.arange(len(tokens), device=tokens.device)
        size = torch.ones(len(tokens), 1, device=tokens.device)
        while len(tokens) > count:
            order, pairs = matched(keys, min(len(tokens) // 2, len(tokens) - count))
            tokens, keys = (average(x, size, order, pairs) for x in (tokens, keys))
            size, places = pooled(size, order, pairs), places[order]
            back = places.argsort()
            tokens, keys, size, places = tokens[back], keys[back], size[back], places[back]
        return Pruned(tokens.to(seen.tokens.dtype), places)


def matched(keys: Tensor, pairs: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The tokens that remain when the most similar pairs are merged, and the pairs.

    Args:
        keys: [... N C], by which tokens are compared; even places are merged into odd ones.
        pairs: number of pairs, at most N // 2.
    Returns:
        [... N - pairs] int64 indices of the remaining tokens: the even ones by falling similarity
        to their match, then the odd ones; and [... pairs] indices of merged tokens and of what they
        are merged into.
    """
    unit = functional.normalize(keys, dim=-1)
    best, match = (unit[..., ::2, :] @ unit[..., 1::2, :].mT).max(-1)  # of each even token
    order = best.argsort(-1, descending=True)
    merged, stay = order[..., :pairs], order[..., pairs:]
    odd = torch.arange(1, keys.shape[-2], 2, device=keys.device)
    odd = odd.expand(*stay.shape[:-1], -1)
    return torch.cat([2 * stay, odd], -1), (2 * merged, 2 * match.gather(-1, merged) + 1)


def chosen(values: Tensor, at: Tensor) -> Tensor:
    """[... K C] of [... N C] at places [... K]."""
    return values.gather(-2, at[..., None].expand(*at.shape, values.shape[-1]))


def pooled(values: Tensor, order: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """[... K C] sums of [... N C] over what is merged, in the order of `matched`."""
    gone, into = pairs
    into = into[..., None].expand(*into.shape, values.shape[-1])
    return chosen(values.scatter_add(-2, into, chosen(values, gone)), order)


def average(values: Tensor, size: Tensor, order: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """[... K C] averages of [... N C], weighted by the tokens [... N 1] each one stands for."""
    return pooled(values * size, order, pairs) / pooled(size, order, pairs)
