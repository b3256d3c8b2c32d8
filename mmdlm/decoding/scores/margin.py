"""Confidence = lead of the best token over the second best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.numerics import log_odds
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Margin(Strategy):
    """Ranks positions by the difference of their two highest probabilities.

    Source: `topk_margin` of HKUNLP/Dream: generation_utils.py.
    """

    paper: ClassVar[str] = "Dream, arXiv 2508.15487"

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] p1 - p2 - 1, in [-1, 0]: near 0 float32 tells more numbers apart than near 1."""
        best = logits.argmax(-1)
        odds = log_odds(logits, best)
        first = logits.gather(-1, best[..., None])
        others = logits.scatter(-1, best[..., None], -torch.inf)
        second = (others.amax(-1) - first[..., 0]).exp() * odds.sigmoid()
        return -((-odds).sigmoid() + second)
