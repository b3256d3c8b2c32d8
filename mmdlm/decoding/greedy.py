"""The most probable token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class Greedy(Strategy):
    """Picks the token with the highest logit; the lower id wins a tie. The loop's default."""

    def pick(self, state: DecodeState, logits: Tensor) -> Tensor:
        """[B R] int64."""
        return logits.argmax(-1)
