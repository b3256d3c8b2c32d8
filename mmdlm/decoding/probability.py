"""Confidence = probability of the candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy

PIECE = 2**18
"""Logits looked at together on a CPU: 1 MB."""


@dataclass(frozen=True)
class Probability(Strategy):
    """Ranks candidates by their probability, as log-odds. The loop's default.

    Source: low-confidence remasking (ML-GSAI/LLaDA: generate.py); `maskgit_plus` of Dream.
    """

    paper: ClassVar[str] = "LLaDA, arXiv 2502.09992"
    exact: ClassVar[bool] = True

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
    if logits.device.type != "cpu":
        return _log_odds(logits, tokens)
    # In pieces that stay in the cache of a core: a fresh copy of all logits would cost more in page
    # faults than the arithmetic does.
    flat, chosen = logits.flatten(0, -2), tokens.flatten()
    rows = max(1, PIECE // max(1, flat.shape[1]))
    parts = [_log_odds(*each) for each in zip(flat.split(rows), chosen.split(rows), strict=True)]
    return torch.cat(parts).view(tokens.shape) if parts else logits.new_zeros(tokens.shape)


def _log_odds(logits: Tensor, tokens: Tensor) -> Tensor:
    chosen = logits.gather(-1, tokens[..., None])
    others = (logits - chosen).scatter_(-1, tokens[..., None], -torch.inf)
    best = others.amax(-1, keepdim=True)
    # Where nothing else is possible the best is -inf, which must not be subtracted from itself.
    total = others.sub_(best.clamp(min=torch.finfo(best.dtype).min)).exp_().sum(-1)
    return -(total.log() + best[..., 0])
