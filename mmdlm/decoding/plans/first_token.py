"""LaViDa-Dream first token: the prompt alone decides how an answer begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.positions import heads
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class FirstToken(Strategy):
    """First token: of a shifted family with `PrefixLM`, fills it in the step that runs the prompt.

    The last position of the prompt scores the first token of the answer. Where the prompt does not
    attend to the answer, that score never changes, so the token is committed first and by itself,
    and schedules count the others. Without this strategy it competes with the others in every step.
    It changes nothing in a family that is not shifted, or where the prompt attends to the answer.

    Source: the prefix cache of jacklishufan/LaViDa: llava/model/language_model/dream/
    generation_utils.py. There the first token is the most probable one at any temperature.
    """

    paper: ClassVar[str] = "LaViDa, arXiv 2505.16839"
    steady: ClassVar[bool] = True

    def narrow(self, view: View) -> Tensor:
        """[B L] bool, the first position while it is masked, then all others."""
        alone = _alone(view)
        return alone == (alone & view.left).any(1, keepdim=True)

    def block_size(self, view: View) -> Tensor:
        """[B] int64, 0 for the first token: a schedule of any number of steps gives it one."""
        return view.asked.masked_fill((view.plan & _alone(view)).any(1), 0)


def _alone(view: View) -> Tensor:
    """[B L] bool, the first position of the answers that the prompt alone scores."""
    return heads(view) & (torch.arange(view.length) == view.prompt)
