"""Confidence = probability of the candidate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class Probability(Strategy):
    """Ranks candidates by their probability, as log-odds. The loop's default.

    Source: low-confidence remasking (ML-GSAI/LLaDA: generate.py); `maskgit_plus` of Dream.
    """

    def score(self, state: DecodeState, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] log-odds, same order as the float64 probabilities."""
        return state.log_odds


def log_odds(logits: Tensor, tokens: Tensor) -> Tensor:
    """[B R] float32 log p/(1-p) of the chosen tokens.

    The sum over the other ids is taken without the chosen one, so probabilities that round to 1 in
    float32 keep the order a float64 softmax gives them.

    Args:
        logits: [B R V] float32.
        tokens: [B R] int64, columns of `logits`.
    """
    chosen = logits.gather(-1, tokens[..., None])
    others = (logits - chosen).scatter(-1, tokens[..., None], -torch.inf)
    return -others.logsumexp(-1)
