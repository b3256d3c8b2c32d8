"""SchED: commit everything once the logit margins reach a falling threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from encoders.checks import Limit, NonNegativeFloat, NonNegativeInt, PositiveInt, UnitFloat
from mmdlm.backbones.kv import take
from mmdlm.decoding.memory import Entry, PerAnswer, PerRow
from mmdlm.decoding.numerics import logit_margin
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class SchED(Strategy):
    """SchED: commits all masks of a row once its logit margins reach a falling threshold.

    The logit margin of a mask is the difference of its two highest logits, after the strategies
    before this one in the list. With u from 0 in the first step to 1 in the last, the threshold is
    high + (low - high) u ("linear"), low + (high - low) (1 + cos pi u) / 2 ("cosine") or
    low + (high - low) exp(-k u) ("exp"). The candidates are written.

    A step can commit only the positions it computes: everything without a cache, only the block
    between the full passes of `DualCache`. Logits of earlier steps are not used. Every row stops on
    its own; the reference stops its whole batch at once.

    Source: SchED (arXiv 2512.02892; amr-mohamedd/SchED: dream_sampling/sched.py). The default of
    `max_change` is 1, which is the rule of the paper; the released 0 allows no change.

    Args:
        mode: how the threshold falls.
        high: threshold of the first step; if `low` is infinite too, it never stops.
        low: threshold of the last step ("exp" only comes close to it).
        k: how fast "exp" falls.
        statistic: statistic of the margins of all masks: mean, (lower) median or a quantile.
        quantile: which one, 0 to 1.
        max_change: share of the masks whose best token may differ from that of the step before.
        patience: consecutive steps within `max_change` before the step that may stop.
        steps: steps of the whole answer; None: one per position.
    """

    paper: ClassVar[str] = "SchED, arXiv 2512.02892"
    sees: ClassVar[Literal["answer"]] = "answer"

    mode: Literal["linear", "cosine", "exp"] = "cosine"
    high: Limit = 7.5
    low: Limit = 2.5
    k: NonNegativeFloat = 4.0
    statistic: Literal["mean", "median", "quantile"] = "mean"
    quantile: UnitFloat = 0.2
    max_change: UnitFloat = 1.0
    patience: NonNegativeInt = 0
    steps: PositiveInt | None = None

    def begin(self, view: View) -> dict[str, Entry]:
        """Margins and best tokens of a step, those of the step before, and stable steps so far."""
        none = torch.full_like(view.commit_step, -1)
        return {
            "margin": PerAnswer(torch.zeros_like(view.commit_confidence)),
            "best": PerAnswer(none, fill=-1),
            "best_before": PerAnswer(none, fill=-1),
            "stable_steps": PerRow(none.new_zeros(len(none))),
        }

    def observe(self, view: View, logits: Tensor) -> None:
        """Notes the margin and the best token of each mask."""
        mine, masks, start = view.memory(self), view.here(view.masked), view.prompt
        mine["margin"] = view.placed(mine["margin"], masks, logit_margin(view, logits), start)
        mine["best"] = view.placed(mine["best"], masks, logits.argmax(-1), start)

    def stop(self, view: View) -> Tensor:
        """[B] bool."""
        mine, masks, at = view.memory(self), view.here(view.masked), view.at - view.prompt
        margin, best, before = (take(mine[n], at) for n in ("margin", "best", "best_before"))
        statistic = self.aggregate(margin, masks)
        threshold = self.bar(view.step, view.asked if self.steps is None else self.steps)
        changed = masks & (best != before)
        # In float64, as the reference: a share such as 0.3 is exact only there.
        share = changed.sum(1).double() / masks.sum(1).clamp(min=1)
        stable_steps = torch.where(share <= self.max_change, mine["stable_steps"] + 1, 0)
        mine["stable_steps"] = stable_steps
        mine["best_before"] = view.placed(mine["best_before"], masks, best, view.prompt)
        return (statistic >= threshold.to(view.device)) & (stable_steps > self.patience)

    def bar(self, done: Tensor, steps: int | Tensor) -> Tensor:
        """[B] float64, the threshold that the statistic must reach.

        Args:
            done: [B] steps done before the current one.
            steps: number of all steps, or [B].
        """
        steps = torch.as_tensor(steps, device=done.device)
        if self.high == self.low:  # also where both are infinite and have no difference
            return torch.full_like(done, self.low, dtype=torch.float64)
        u = (done.double() / (steps - 1).clamp(min=1)).clamp(0, 1)
        if self.mode == "linear":
            falling = self.high + (self.low - self.high) * u
        else:
            fall = (1 + (math.pi * u).cos()) / 2 if self.mode == "cosine" else (-self.k * u).exp()
            falling = self.low + (self.high - self.low) * fall
        return torch.where(steps == 1, self.low, falling)

    def aggregate(self, margins: Tensor, masks: Tensor) -> Tensor:
        """[B] statistic of the margins, -inf for rows without masks.

        Args:
            margins: [B R].
            masks: [B R] bool, which of them count.
        """
        count = masks.sum(1)
        if self.statistic == "mean":
            value = margins.masked_fill(~masks, 0.0).sum(1) / count.clamp(min=1)
        else:
            ranked = margins.masked_fill(~masks, torch.inf).sort(dim=1).values
            last = (count - 1).clamp(min=0)
            place = self.quantile * last.double()
            below = last // 2 if self.statistic == "median" else place.long()
            value, above = (
                ranked.gather(1, at[:, None])[:, 0] for at in (below, (below + 1).minimum(last))
            )
            if self.statistic == "quantile":
                value = value.lerp(above, (place - below).to(value))
        return value.masked_fill(count == 0, -torch.inf)
