"""Gumbel-max sampling of candidates at a temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoders.checks import NonNegativeFloat
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Gumbel(Strategy):
    """Gumbel-max sampling: draws each candidate from softmax(logits / temperature).

    The candidate is the argmax of exp(z) / (-log u) ** temperature with u uniform, taken in the log
    domain: the same order without overflow. Confidence stays the probability of the candidate
    without temperature. Every row draws from its own stream (`View.uniform`).

    Source: ML-GSAI/LLaDA: generate.py (add_gumbel_noise). It is in float64 because float32 noise
    favours likely tokens (arXiv 2409.02908).

    Args:
        temperature: 0 is greedy.
    """

    paper: ClassVar[str] = "LLaDA, arXiv 2502.09992"

    temperature: NonNegativeFloat = 1.0

    def pick(self, view: View, logits: Tensor) -> Tensor:
        """[B R] int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        u = view.uniform(logits.shape[-1], dtype=torch.float64)
        return (logits - self.temperature * u.log().neg().log()).argmax(-1)
