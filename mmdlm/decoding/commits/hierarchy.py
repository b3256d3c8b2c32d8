"""Commit far apart: the best of every run of masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmdlm.decoding.numerics import best_of_runs, check, passing
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class Hierarchy(Strategy):
    """Commits the best of every run of masks if it exceeds `low`, and all that exceeds `high`.

    A run is a stretch of neighbouring masks of the window, so what commits together below `high`
    has known tokens or other masks in between. The best position of all is committed always.

    Source: inclusionAI/dInfer: python/dinfer/decoding/parallel_strategy.py, both HierarchyDecoder
    and get_transfer_index_hierarchy_fast_v2: what differs there is what happens where nothing
    exceeds `low`, and the loop's rule that the best is committed makes them one. Of equal
    positions of a run we take the first, the former takes all.

    Args:
        high: probability that is enough anywhere; None: nothing is.
        low: probability that is enough for the best of a run; None: it always commits.
    """

    paper: ClassVar[str] = "dInfer, arXiv 2510.08666"

    high: float | None = 0.9
    low: float | None = 0.4

    def __post_init__(self) -> None:
        check(self, "high", "low")

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        masks = view.masked & view.within()
        best = best_of_runs(state, masks, view.open, view.confidence)
        return passing(state, best, self.high, self.low)
