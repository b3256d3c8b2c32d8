"""dKV-Cache-Greedy: recompute a window around the positions of a known random order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoders.checks import NonNegativeInt, PositiveInt
from mmdlm.backbones.kv import take
from mmdlm.decoding.memory import Entry, PerCanvas
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.positions import needed
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class DKVGreedy(Strategy):
    """dKV-Cache-Greedy: random order; recomputes the latest tokens, the next ones and a window.

    Positions commit in an order that is drawn when a block opens, in equal shares per step (as
    `TopK` has them). So the positions worth computing are known before the forward: the tokens of
    the latest step, the positions of this one, and for each of these the `window` nearest masks,
    left and right in alternation. Everything else, masks too, keeps its keys and values until the
    next full pass; the first step of a block is one. Approximate. In a shifted family the positions
    that score those of this step are added.

    Source: horseee/dKV-Cache: generation_utils/llada_dkv_cache_greedy.py, which takes a random
    order only. Every row draws from its own stream (`View.uniform_at`).

    Args:
        window: masks recomputed around each position that is next.
        every: steps of a block from one full pass to the next.
        steps: steps for the whole answer; None: one per token.
    """

    paper: ClassVar[str] = "dKV-Cache, arXiv 2505.15781"
    requires: ClassVar[frozenset[str]] = frozenset({"final_tokens"})
    denies: ClassVar[frozenset[str]] = frozenset({"all_scored"})

    window: NonNegativeInt = 4
    every: PositiveInt = 2
    steps: PositiveInt | None = None

    def begin(self, view: View) -> dict[str, Entry]:
        """The masks of the latest step, and the order of positions; -1 where none was drawn."""
        order = torch.full(view.left.shape, -1.0)
        return {"left": PerCanvas(view.left, fill=False), "order": PerCanvas(order, fill=-1.0)}

    def refresh(self, view: View) -> Refresh:
        """All that can have changed, or the positions worth computing."""
        mine, left = view.memory(self), view.left
        written = mine["left"] & ~left
        mine["left"] = left
        full = ~view.has_cache | (view.block_step % self.every == 0)
        if bool(full.all()):
            return Refresh(needed(view))
        masks = view.plan & left
        order = mine["order"].masked_fill(~masks, -torch.inf)
        planned = masks & (rank(order) < self._due(view)[:, None]) & ~full[:, None]
        compute = written | planned
        places = order.sort(dim=1, descending=True, stable=True).indices
        counts = planned.sum(1)
        for n in range(int(counts.max())):
            compute = widened(compute, left, places[:, n], self.window, n < counts)
        if view.model.spec.shift:
            compute |= planned.roll(-1, 1)
        return Refresh(torch.where(full[:, None], needed(view), compute))

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] uniform in [0, 1), drawn when the block opens."""
        mine, order = view.memory(self), view.memory(self)["order"]
        draws = view.plan & view.left & ((view.block_step == 0)[:, None] | (order < 0))
        if bool(draws.any()):
            mine["order"] = order = torch.where(draws, view.uniform_at(draws).cpu(), order)
        return take(order.to(view.device), view.at)

    def select(self, view: View) -> Tensor:
        """[B R] bool, the positions that are next in the order."""
        return rank(view.confidence) < self._due(view).to(view.device)[:, None]

    def _due(self, view: View) -> Tensor:
        """[B] int64 on the host, positions that commit in this step."""
        masks = view.block_masks
        if self.steps is None:
            return torch.ones_like(masks)
        steps, now = view.share(self.steps), view.block_step
        due = torch.where(now >= steps - 1, masks, masks // steps + (now < masks % steps))
        return due.clamp(min=1)


def widened(compute: Tensor, masks: Tensor, centre: Tensor, count: int, where: Tensor) -> Tensor:
    """Positions with the nearest masks around one of them added.

    Args:
        compute: [B L] bool.
        masks: [B L] bool.
        centre: [B] int64.
        count: masks to add that are not in `compute`, left and right in alternation.
        where: [B] bool, the rows to which they are added.
    Returns:
        [B L] bool.
    """
    away = torch.arange(compute.shape[1]) - centre[:, None]
    distance = 2 * away.abs() - (away < 0).long()  # left comes first: 1, 3, ...; right: 2, 4, ...
    free = masks & ~compute & where[:, None]
    near = distance.masked_fill(~free, 2 * compute.shape[1] + 1).argsort(1)[:, :count]
    return compute | (torch.zeros_like(compute).scatter(1, near, True) & free)
