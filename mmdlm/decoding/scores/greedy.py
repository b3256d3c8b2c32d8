"""Greedy candidates: the most probable token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Greedy(Strategy):
    """Greedy candidates: the token with the highest logit; the lower id wins a tie. The default."""

    paper: ClassVar[str] = "LLaDA, arXiv 2502.09992"
    exact: ClassVar[bool] = True

    def pick(self, view: View, logits: Tensor) -> Tensor:
        """[B R] int64."""
        return logits.argmax(-1)
