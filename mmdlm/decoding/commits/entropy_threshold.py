"""dParallel: commit all positions of low entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from encoders.checks import Limit
from mmdlm.decoding.numerics import entropy
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class EntropyThreshold(Strategy):
    """dParallel: commits positions whose entropy is at most `tau`, and always the lowest.

    It decides `score` as well, so that the position that always commits is the one of lowest
    entropy. It is fast with models trained to be certain early (the dParallel checkpoints); with
    other models it is an ordinary threshold.

    Source: czg1225/dParallel: LLaDA/generate.py (get_transfer_index_entropy).

    Args:
        tau: entropy in nats; 0 commits one per step unless more are certain.
    """

    paper: ClassVar[str] = "dParallel, arXiv 2509.26488"

    tau: Limit = 0.5

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] negative entropy in nats, 0 at most."""
        return -entropy(logits)

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        return view.confidence >= -self.tau
