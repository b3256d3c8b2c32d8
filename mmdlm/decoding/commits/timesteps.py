"""Commits that follow a noise level from 1 down to almost 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.numerics import rank
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class Timesteps(Strategy):
    """Commits the share of the remaining masks by which the noise level falls in a step.

    Levels fall evenly from 1 to `eps`; going from t to s, a block with m masks commits
    int(m (1 - s / t)) of them, and all in the last step. The number is truncated, so with about as
    many steps as masks some early steps commit nothing; their forward is spent all the same.

    Source: HKUNLP/Dream: generation_utils.py (diffusion_generate).

    Args:
        steps: steps for the whole answer, split evenly over the blocks; None: one per token.
        eps: the last level.
    """

    paper: ClassVar[str] = "Dream, arXiv 2508.15487"
    may_idle: ClassVar[bool] = True

    steps: int | None = None
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Timesteps.steps is {self.steps}, expected at least 1")
        if not 0 < self.eps < 1:
            raise ValueError(f"Timesteps.eps is {self.eps}, expected a level between 0 and 1")

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool."""
        steps, now = state.share(self.steps or state.asked), state.block_step
        is_open = state.open
        if now >= steps - 1:
            return is_open
        # float32 throughout: the truncation of the reference depends on its rounding.
        level = torch.linspace(1, self.eps, steps + 1)
        fall = 1 - level[now + 1] / level[now]
        quota = (is_open.sum(1).float() * fall.to(is_open.device)).long()
        return rank(state.confidence) < quota[:, None]

    def lasts(self, state: DecodeState) -> bool:
        """Until the last step, as a level never falls to zero."""
        return state.block_step < state.share(self.steps or state.asked) - 1
