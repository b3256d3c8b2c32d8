"""Penalty on the end token that falls with the noise level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from encoders.checks import Above, Below, NonNegativeFloat, PositiveInt
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class EosPenalty(Strategy):
    """Dream-VL's `eos_penalty`: adds weight x log(1 - t + eps) to the logit of the end token.

    The noise level t falls from 1 to `eps` as in `Timesteps`, so the end token is unlikely in the
    first steps and almost free in the last ones. Use it with the same `steps` as `Timesteps`, and
    before `Nucleus`.

    Source: DreamLM/Dream-VLX: vl/train/dreamvl/generation_utils.py (_sample). It takes the pad id,
    which is Dream's end id as well.

    Args:
        weight: 0 changes nothing.
        steps: steps for the whole answer, split evenly over the blocks; None: one per token.
        eps: the last level.
    """

    paper: ClassVar[str] = "Dream-VL, arXiv 2512.22615"

    weight: NonNegativeFloat = 1.0
    steps: PositiveInt | None = None
    eps: Annotated[float, Above(0), Below(1)] = 1e-3

    def guide(self, view: View, logits: Tensor) -> Tensor:
        """[B R V], changed in place at the end token."""
        column = view.model.spec.eos_id - view.first_id
        if not 0 <= column < logits.shape[-1]:
            return logits
        steps = view.share(view.asked if self.steps is None else self.steps)
        levels = [
            torch.linspace(1, self.eps, s + 1)[min(n, s)]
            for s, n in zip(steps.tolist(), view.block_step.tolist(), strict=True)
        ]
        added = self.weight * (1 - torch.stack(levels) + self.eps).log()
        logits[..., column] += added[:, None].to(logits.device)
        return logits
