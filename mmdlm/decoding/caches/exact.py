"""Exact cache: recompute every position that can have changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.positions import needed
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Exact(Strategy):
    """Exact cache: reuses final keys and values; the logits are those of a full recompute.

    A row's keys depend on rows of its own level and below only (`mmdlm.layout`). So rows below the
    level of the first masked position are final once computed with their tokens known: the prompt
    of a prefix model, the finished blocks of a block-causal one, the tokens written so far of an
    autoregressive one. With full attention nothing is final and every step recomputes everything.
    This is the loop's default.
    """

    exact: ClassVar[bool] = True

    def refresh(self, view: View) -> Refresh:
        """Positions from the first level that may have changed to the last that matters."""
        if view.one_level:
            return Refresh(needed(view), cached=False)
        return Refresh(needed(view))
