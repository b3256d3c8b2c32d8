"""dInfer vicinity cache: recompute the open block and its neighbourhood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from encoders.checks import NonNegativeInt, PositiveInt
from mmdlm.decoding.positions import between, needed, scoring, span
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class VicinityCache(Strategy):
    """dInfer vicinity cache: recomputes the block and its neighbours; a full pass opens it.

    Neighbours matter most to a block and change most with it, so a dual cache whose block is a
    little larger loses less. All passes commit. Approximate: within a block, positions farther away
    keep the keys and values they had when it opened.

    Source: inclusionAI/dInfer: python/dinfer/decoding/generate_uniform.py (VicinityCacheIteration,
    `prefix_look`, `after_look`, `warmup_steps`; `cache_update_freq` is `every`). It counts steps
    from the start of the answer; here they count from the start of the block, and warming up ends
    with the first block. A block that its full pass finishes costs no further forward, and a
    shifted family has the position before the block computed with it instead of a window moved by
    one.

    Args:
        before: positions recomputed before the block.
        after: positions recomputed after it.
        every: steps of a block from one full pass to the next; None: only when it opens.
        warmup: number of first steps of the first block that are full passes.
    """

    paper: ClassVar[str] = "dInfer, arXiv 2510.08666"
    denies: ClassVar[frozenset[str]] = frozenset({"all_scored"})

    before: NonNegativeInt = 16
    after: NonNegativeInt = 16
    every: PositiveInt | None = None
    warmup: NonNegativeInt = 0

    def refresh(self, view: View) -> Refresh:
        """All that can have changed, or the block and its neighbours."""
        start, stop = span(view)
        now = view.block_step if self.every is None else view.block_step % self.every
        first_block = start[:, 0] == view.prompt
        full = ~view.has_cache | (now == 0) | (first_block & (view.block_step < self.warmup))
        if bool(full.all()):
            return Refresh(needed(view))
        # What is final (see `Exact`) does not get better by being near.
        near = between(view, start - self.before, stop + self.after)
        near = near & (view.level >= view.settled[:, None])
        near = near | between(view, start, stop) | scoring(view)
        return Refresh(torch.where(full[:, None], needed(view), near))
