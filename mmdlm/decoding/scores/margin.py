"""Confidence = difference of the two highest probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmdlm.decoding.numerics import margin
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Margin(Strategy):
    """Top-2 margin as confidence: the difference of the two highest probabilities.

    Source: `topk_margin` of HKUNLP/Dream: generation_utils.py.
    """

    paper: ClassVar[str] = "Dream, arXiv 2508.15487"

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] p1 - p2 - 1, in [-1, 0]."""
        return margin(logits)
