"""Confidence = place in the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class LeftToRight(Strategy):
    """Left-to-right order: fills positions in reading order, whatever their confidence.

    Source: `remasking_strategy="sequential"` of JetAstra/SDAR: generate.py.
    """

    paper: ClassVar[str] = "SDAR, arXiv 2510.06303"

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] minus the place among the read positions, 0 for the first."""
        return -torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape).float()
