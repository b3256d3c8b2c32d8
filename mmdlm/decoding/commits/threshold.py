"""Fast-dLLM threshold: commit positions of high probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoders.checks import Cutoff, PositiveInt
from mmdlm.decoding.numerics import odds_of, rank
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Threshold(Strategy):
    """Fast-dLLM threshold: commits positions whose probability reaches `tau`, and always the best.

    Source: Fast-dLLM (arXiv 2505.22618; NVlabs/Fast-dLLM: llada/generate.py); with `steps` the
    `confidence_threshold` of NVlabs/Fast-dLLM: dream/model/generation_utils.py, which carries what
    a step may commit but does not over to the next. inclusionAI/dInfer: python/dinfer/decoding/
    parallel_strategy.py (get_transfer_index_threshold) has the same rule, but where nothing reaches
    `tau` commits all within 1e-5 of the best, and passes over positions where the mask id is best.

    Args:
        tau: probability; 0 commits all at once, above 1 one per step.
        steps: never ahead of an even schedule with this number of steps for the whole answer;
            None: no limit.
    """

    paper: ClassVar[str] = "Fast-dLLM, arXiv 2505.22618"

    tau: Cutoff = 0.9
    steps: PositiveInt | None = None

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        passes = view.log_odds >= odds_of(self.tau)
        if self.steps is None:
            return passes
        steps, masks, now = view.share(self.steps), view.block_masks, view.block_step + 1
        due = torch.where(
            now < steps, masks // steps * now + torch.minimum(masks % steps, now), masks
        )
        filled = masks.to(view.device) - (view.masked & view.opened).sum(1)
        return passes & (rank(view.confidence) < (due.to(view.device) - filled)[:, None])
