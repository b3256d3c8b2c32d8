"""LLaDA top-k: a fixed number of tokens per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoders.checks import PositiveInt
from mmdlm.decoding.schedules import scheduled
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class TopK(Strategy):
    """LLaDA top-k: commits the most confident positions, an equal number in each step.

    A block with m masks and S steps commits m // S per step and one more in the first m mod S; the
    last step commits whatever is left.

    Source: ML-GSAI/LLaDA: generate.py (get_num_transfer_tokens). The loop's default, with one
    token per step.

    Args:
        steps: steps for the whole answer, split evenly over the blocks; None: one per token.
    """

    paper: ClassVar[str] = "LLaDA, arXiv 2502.09992"

    steps: PositiveInt | None = None

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        return scheduled(view, self.steps)

    def lasts(self, view: View) -> bool:
        """Whether every row has more masks than it has committed after this step."""
        masks, now = view.block_masks, view.block_step + 1
        steps = masks if self.steps is None else view.share(self.steps)
        done = masks // steps * now + torch.minimum(now, masks % steps)
        return bool(((now < steps) & (done < masks)).all())
