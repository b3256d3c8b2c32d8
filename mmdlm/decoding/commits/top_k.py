"""A fixed number of tokens per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmdlm.decoding.numerics import rank
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class TopK(Strategy):
    """Commits the most confident positions, in equal shares per step.

    A block with m masks and S steps commits m // S per step and one more in the first m mod S; the
    last step commits whatever is left.

    Source: ML-GSAI/LLaDA: generate.py (get_num_transfer_tokens). The loop's default, with one
    token per step.

    Args:
        steps: steps for the whole answer, split evenly over the blocks; None: one per token.
    """

    paper: ClassVar[str] = "LLaDA, arXiv 2502.09992"

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"TopK.steps is {self.steps}, expected at least 1")

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool."""
        if self.steps is None:
            return rank(state.confidence) < 1
        steps = state.share(self.steps)
        if state.block_step >= steps - 1:
            return state.open
        masks = state.block_masks
        quota = masks // steps + (state.block_step < masks % steps)
        return rank(state.confidence) < quota[:, None]

    def lasts(self, state: DecodeState) -> bool:
        """Whether the fullest row has more masks than it has committed by then."""
        masks, now = state.block_most, state.block_step + 1
        steps = masks if self.steps is None else state.share(self.steps)
        return now < steps and masks // steps * now + min(now, masks % steps) < masks
