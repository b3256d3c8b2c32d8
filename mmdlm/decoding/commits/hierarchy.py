"""dInfer's hierarchical decoding: commit the best position of every run of masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from encoders.checks import Cutoff
from mmdlm.decoding.numerics import best_of_runs, passing
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Hierarchy(Strategy):
    """dInfer hierarchical decoding: commits the best of each run of masks, and all above `high`.

    A run is a stretch of neighbouring masks of the block. Positions that commit together below
    `high` therefore have known tokens or other masks in between. The best of all always commits.

    Source: inclusionAI/dInfer: python/dinfer/decoding/parallel_strategy.py, both HierarchyDecoder
    and get_transfer_index_hierarchy_fast_v2. They differ only where nothing exceeds `low`; there
    the loop commits the best position. Of equal positions of a run we commit the first,
    HierarchyDecoder commits all.

    Args:
        high: probability that any position must exceed to commit; None: no probability suffices.
        low: probability that the best of a run must exceed; None: it always commits.
    """

    paper: ClassVar[str] = "dInfer, arXiv 2510.08666"

    high: Cutoff | None = 0.9
    low: Cutoff | None = 0.4

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        masks = view.masked & view.opened
        best = best_of_runs(view, masks, view.open, view.confidence)
        return passing(view, best, self.high, self.low)
