"""Confidence = negative entropy of the distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmdlm.decoding.numerics import entropy
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Entropy(Strategy):
    """Negative entropy as confidence: ranks positions by their entropy, lowest first.

    Source: `entropy` of HKUNLP/Dream: generation_utils.py.
    """

    paper: ClassVar[str] = "Dream, arXiv 2508.15487"

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] negative entropy in nats, 0 at most."""
        return -entropy(logits)
