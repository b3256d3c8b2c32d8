"""SDAR dynamic decoding: commit by a threshold, but no fewer than a schedule."""

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
class Dynamic(Strategy):
    """SDAR dynamic decoding: commits positions above `tau`, but no fewer than a fixed schedule.

    What is due depends on the size of the block (or part, see `SubBlocks`), not on its masks: n
    positions in S steps commit n // S in a step, and one more in the first n mod S. So a first
    block that holds the end of the prompt takes fewer steps. Positions above `tau` commit if they
    are at least the number due; otherwise the best ones do, the number due.

    Source: `low_confidence_dynamic` of JetAstra/SDAR: generate.py; with `tau` 1, which nothing
    exceeds, its `low_confidence_static`. LLaDA2.x (ZHZisZZ/dllm:
    dllm/pipelines/llada2/models/modeling_llada2_moe.py) has the same rule; `minimal_topk` there
    only bounds the steps, by the length of the answer // minimal_topk. With one step per position
    it is the rule of Fast-dLLM v2 (Efficient-Large-Model/Fast_dLLM_v2_7B: modeling.py).

    Args:
        steps_per_block: S, `denoising_steps` of SDAR and `steps` of LLaDA2; None: one per position.
        tau: probability that a position must exceed; 0 commits all at once.
    """

    paper: ClassVar[str] = "SDAR, arXiv 2510.06303"

    steps_per_block: PositiveInt | None = None
    tau: Cutoff = 0.9

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        size, now = view.block_size, view.block_step
        steps = size if self.steps_per_block is None else self.steps_per_block
        due = (size // steps + (now < size % steps)).to(view.device)[:, None]
        passes = view.open & (view.log_odds > odds_of(self.tau))
        enough = passes.sum(1, keepdim=True) >= due
        return torch.where(enough, passes, rank(view.confidence) < due)
