"""Confidence = place in the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class LeftToRight(Strategy):
    """Fills positions in reading order, however sure they are.

    Source: `remasking_strategy="sequential"` of JetAstra/SDAR: generate.py.
    """

    def score(self, state: DecodeState, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] minus the place among the read positions, 0 for the first."""
        return -torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape).float()
