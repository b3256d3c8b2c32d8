"""Dream timesteps: commits that follow a noise level from 1 to almost 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from encoders.checks import Above, Below, PositiveInt
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Timesteps(Strategy):
    """Dream timesteps: commits the share of masks by which the noise level falls in a step.

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

    steps: PositiveInt | None = None
    eps: Annotated[float, Above(0), Below(1)] = 1e-3

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        steps = view.share(view.asked if self.steps is None else self.steps)
        # float32 throughout: the truncation of the reference depends on its rounding.
        falls = [
            fall(self.eps, int(s), int(n)) for s, n in zip(steps, view.block_step, strict=True)
        ]
        part = torch.tensor(falls, device=view.device)
        quota = (view.open.sum(1).float() * part).long()
        last = (view.block_step >= steps - 1).to(view.device)
        return view.open & (last[:, None] | (rank(view.confidence) < quota[:, None]))

    def lasts(self, view: View) -> bool:
        """Until the last step, as a level never falls to zero."""
        steps = view.share(view.asked if self.steps is None else self.steps)
        return bool((view.block_step < steps - 1).all())


def fall(eps: float, steps: int, now: int) -> float:
    """Share by which the noise level falls in a step, in float32.

    Args:
        eps: the last level.
        steps: number of steps.
        now: steps done; beyond the last one, all of the noise goes.
    """
    if now >= steps - 1:
        return 1.0
    level = torch.linspace(1, eps, steps + 1)
    return float(1 - level[now + 1] / level[now])
