"""Recompute next to nothing, in an order that is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.backbones.kv import take
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.recompute import anew, open_masks
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy


@dataclass(frozen=True)
class DKVGreedy(Strategy):
    """Fills a block in random order; recomputes what was just filled, what is next, and near it.

    Positions commit in an order that is drawn when a block opens, in equal shares per step (as
    `TopK` has them). So the rows worth computing are known before the forward: the tokens of the
    latest step, the positions of this one, and for each of these the `window` nearest masks on
    either side by turns. Everything else, masks too, keeps its keys and values until the next full
    pass; the first step of a block is one. Approximate. In a shifted family the rows that score the
    positions of this step are added.

    Source: horseee/dKV-Cache: generation_utils/llada_dkv_cache_greedy.py, which takes a random
    order only. Every row draws from its own stream (`DecodeState.uniform`).

    Args:
        window: masks recomputed around each position that is next.
        every: steps of a block from one full pass to the next.
        steps: steps for the whole answer; None: one per token.
    """

    paper: ClassVar[str] = "dKV-Cache, arXiv 2505.15781"
    excludes: ClassVar[tuple[str, ...]] = ("edit",)  # a token kept here would not see its change

    window: int = 4
    every: int = 2
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"DKVGreedy.window is {self.window}, expected at least 0")
        for name in ("every", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"DKVGreedy.{name} is {value}, expected at least 1")

    def refresh(self, state: DecodeState) -> Refresh:
        """All rows that can have changed, or the chosen few."""
        memory, left, masks = state.memory, state.left, open_masks(state)
        before = memory.get((self, "left"))
        memory[self, "left"] = left
        if state.block_step == 0 or (self, "masks") not in memory:
            memory[self, "masks"] = masks.sum(1)
        if state.block_step % self.every == 0 or before is None:
            return anew(state)
        order = memory[self, "order"].masked_fill(~masks, -torch.inf)
        planned = masks & (rank(order) < self._due(state)[:, None])
        rows = (before & ~left) | planned
        places = order.sort(dim=1, descending=True, stable=True).indices
        counts = planned.sum(1)
        for n in range(int(counts.max())):
            rows = widened(rows, left, places[:, n], self.window, n < counts)
        if state.model.spec.shift:
            rows |= planned.roll(-1, 1)
        # A list must not be empty. What a row that waits for others rewrites is renewed by the full
        # pass that opens the next block.
        rows[~masks.any(1), state.window.start] = True
        return Refresh(0, state.length, cached=True, rows=rows)

    def score(self, state: DecodeState, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] uniform in [0, 1), drawn when the block opens."""
        if state.block_step == 0 or (self, "order") not in state.memory:
            order = torch.zeros(state.left.shape, device=state.at.device)
            state.put(order, state.open, state.uniform())
            state.memory[self, "order"] = order.cpu()
        return take(state.memory[self, "order"].to(state.at.device), state.at)

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool."""
        due = self._due(state).to(state.confidence.device)
        return rank(state.confidence) < due[:, None]

    def _due(self, state: DecodeState) -> Tensor:
        """[B] int64 on the CPU, positions that commit in this step."""
        masks = state.memory[self, "masks"]
        if self.steps is None:
            return torch.ones_like(masks)
        steps = state.share(self.steps)
        if state.block_step >= steps - 1:
            return masks.clamp(min=1)
        return (masks // steps + (state.block_step < masks % steps)).clamp(min=1)


def widened(rows: Tensor, masks: Tensor, centre: Tensor, count: int, where: Tensor) -> Tensor:
    """Rows with the nearest masks around a position added.

    Args:
        rows: [B L] bool.
        masks: [B L] bool.
        centre: [B] int64.
        count: masks to add that are not among the rows, left and right by turns.
        where: [B] bool, the batch rows to which they are added.
    Returns:
        [B L] bool.
    """
    away = torch.arange(rows.shape[1]) - centre[:, None]
    turn = 2 * away.abs() - (away < 0).long()  # left comes first: 1, 3, ...; right: 2, 4, ...
    free = masks & ~rows & where[:, None]
    near = turn.masked_fill(~free, 2 * rows.shape[1] + 1).argsort(1)[:, :count]
    return rows | (torch.zeros_like(rows).scatter(1, near, True) & free)
