"""Confidence = a random number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class RandomOrder(Strategy):
    """Random order: every row draws from a separate stream (`View.uniform`).

    Source: `remasking="random"` of ML-GSAI/LLaDA: generate.py.
    """

    paper: ClassVar[str] = "LLaDA, arXiv 2502.09992"

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] uniform in [0, 1), drawn anew in every step."""
        return view.uniform()
