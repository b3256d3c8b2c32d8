"""LaViDa time shift: numbers of tokens per step from a shifted clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from encoders.checks import Above, Below, PositiveInt
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.schedules import Counts, due, lasts
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class TimeShift(Strategy):
    """LaViDa time shift: commits few positions per step first and many last, or the reverse.

    With t going evenly from 0 to 1 the clock is s = a t / (1 + (a - 1) t), or for "cosine"
    s = (1 - cos pi t) / 2. A step of n masks in S steps gets the difference of int(s n), at least
    one; what this adds is taken from the first steps that have more than one, in turns; and the
    whole list is used backwards. So a shift of 3 starts slowly, and 1 / 3 starts fast.

    Source: LaViDa (arXiv 2505.16839; jacklishufan/LaViDa:
    llava/model/language_model/llada/generate.py). Where rounding makes the reference end one short
    and stop, the last tick is exactly 1 here.

    Args:
        steps: steps for the whole answer, split evenly over the blocks; None: one for two tokens,
            as in the demonstration of the reference.
        shift: a, for the schedule "shift".
        schedule: the clock.
    """

    paper: ClassVar[str] = "LaViDa, arXiv 2505.16839"

    steps: PositiveInt | None = None
    shift: Annotated[float, Above(0), Below(math.inf)] = 3.0
    schedule: Literal["shift", "cosine"] = "shift"

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        return rank(view.confidence) < due(view, *self._schedule(view))[:, None]

    def lasts(self, view: View) -> bool:
        """[B R] bool, as many as the schedule commits in this step."""
        return lasts(view, *self._schedule(view))

    def _schedule(self, view: View) -> tuple[Tensor, Counts]:
        """Steps of each row's block, and how many commit in each."""
        steps = view.share((view.asked + 1) // 2 if self.steps is None else self.steps)
        return steps, lambda masks, steps: shifted(masks, steps, self.shift, self.schedule)


@lru_cache(maxsize=4096)
def shifted(masks: int, steps: int, shift: float, schedule: str) -> list[int]:
    """Tokens to commit in each step, at most as many steps as masks; see `TimeShift`."""
    steps = min(steps, masks)
    if not steps:
        return []
    t = torch.linspace(0, 1, steps + 1)
    # float32, in which the reference rounds down.
    clock = (1 - torch.cos(torch.pi * t)) * 0.5 if schedule == "cosine" else _shift(t, shift)
    clock[-1] = 1
    counts = (clock * masks).long().diff().clamp(min=1).tolist()
    surplus, at = sum(counts) - masks, 0
    while surplus:
        if counts[at] > 1:
            counts[at] -= 1
            surplus -= 1
        at = (at + 1) % steps
    return counts[::-1]


def _shift(t: Tensor, a: float) -> Tensor:
    return a * t / (1 + (a - 1) * t)
