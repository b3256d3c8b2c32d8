"""Confidence = probability of the candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Probability(Strategy):
    """Probability as confidence: ranks candidates by their log-odds. The default.

    Source: low-confidence remasking (ML-GSAI/LLaDA: generate.py); `maskgit_plus` of Dream.
    """

    paper: ClassVar[str] = "LLaDA, arXiv 2502.09992"
    exact: ClassVar[bool] = True

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] log-odds, same order as the float64 probabilities."""
        return view.log_odds
