"""Commit as many as may be uncertain together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmdlm.decoding.numerics import entropy, rank
from mmdlm.decoding.scores.entropy import Entropy
from mmdlm.decoding.scores.margin import Margin
from mmdlm.decoding.scores.probability import Probability
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy

ORDERS = {"confidence": Probability(), "entropy": Entropy(), "margin": Margin()}


@dataclass(frozen=True)
class EntropyBound(Strategy):
    """Commits the longest list, best first, whose entropies without the largest sum to `gamma`.

    Tokens drawn independently miss at most that much of what they tell about each other: the sum of
    their entropies less the largest one bounds their mutual information from above.

    Source: the EB-Sampler's rule as in its paper (arXiv 2505.24857). Kamichanw/d2Cache:
    src/generation/vanilla.py takes the largest entropy over the rows of the batch instead of the
    list; at batch 1 it so leaves out the entropy of the last position in the list, which is the
    same with `order="entropy"`.

    Args:
        gamma: nats, 0 or more; 0 commits one per step unless more are certain.
        order: what ranks the positions: probability of the token, entropy, or lead of the best
            token over the second.
    """

    paper: ClassVar[str] = "EB-Sampler, arXiv 2505.24857"

    gamma: float = 1e-3
    order: Literal["confidence", "entropy", "margin"] = "confidence"

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"EntropyBound.gamma is {self.gamma}, expected nats, 0 or more")
        if self.order not in ORDERS:
            raise ValueError(
                f"EntropyBound.order is {self.order!r}, expected one of {', '.join(ORDERS)}"
            )

    def score(self, state: DecodeState, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] as `Probability`, `Entropy` or `Margin`; keeps the entropies for `select`."""
        state.memory[self] = entropy(logits)
        return ORDERS[self.order].score(state, logits, tokens)

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool."""
        place = rank(state.confidence)
        listed = torch.empty_like(state.memory[self]).scatter_(1, place, state.memory[self])
        # A longer list never has a smaller sum, so those that fit are a start of the list.
        fits = listed.cumsum(1) - listed.cummax(1).values <= self.gamma
        return place < fits.sum(1, keepdim=True)
