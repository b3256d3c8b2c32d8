"""Commit everything once it is decided enough for the time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmdlm.backbones.kv import take
from mmdlm.decoding.compatibility import aligned
from mmdlm.decoding.numerics import lead
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy

MODES = ("linear", "cosine", "exp")
STATISTICS = ("mean", "median", "quantile")


@dataclass(frozen=True)
class SchED(Strategy):
    """Commits all masks of a row when their leads reach a bar that falls from step to step.

    The lead of a mask is the difference of its two highest logits, as they are where this strategy
    stands in the list. With u from 0 in the first step to 1 in the last, the bar is
    high + (low - high) u ("linear"), low + (high - low) (1 + cos pi u) / 2 ("cosine") or
    low + (high - low) exp(-k u) ("exp"). What is written are the candidates.

    A step sees, and can commit, only what it computes: everything without a cache, only the block
    between the full passes of `DualCache`. Logits of earlier steps are not used. Every row stops by
    itself (the reference stops its batch at once), and steps in which it waits for others do not
    count.

    Source: SchED (arXiv 2512.02892; amr-mohamedd/SchED: dream_sampling/sched.py). The default of
    `max_change` is 1, which is the rule of the paper; the released 0 lets no guess change.

    Args:
        mode: how the bar falls.
        high: bar of the first step; infinity, with `low`, never stops.
        low: bar of the last step (not quite for "exp").
        k: how fast "exp" falls.
        statistic: of the leads of all masks: their mean, (lower) median or a quantile.
        quantile: which one, 0 to 1.
        max_change: share of the masks whose best token may be another than in the step before.
        patience: steps in a row with no more changes than that, before the step that may stop.
        steps: steps of the whole answer; None: one per position.
    """

    paper: ClassVar[str] = "SchED, arXiv 2512.02892"
    sees: ClassVar[Literal["answer"]] = "answer"
    # It computes for every row what any row needs, which rows alone would not look at.
    excludes: ClassVar[tuple[str, ...]] = ("SubBlockCache",)

    mode: Literal["linear", "cosine", "exp"] = "cosine"
    high: float = 7.5
    low: float = 2.5
    k: float = 4.0
    statistic: Literal["mean", "median", "quantile"] = "mean"
    quantile: float = 0.2
    max_change: float = 1.0
    patience: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("statistic", STATISTICS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"SchED.{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        for name in ("high", "low", "k", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"SchED.{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("quantile", "max_change"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"SchED.{name} is {getattr(self, name)}, expected 0 to 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"SchED.steps is {self.steps}, expected at least 1")

    def begin(self, state: DecodeState) -> None:
        """Starts to count steps and changes of each row.

        Raises:
            ValueError: see `aligned`.
        """
        aligned(self, state)
        state.memory[self, "steps"] = state.commit_step.new_zeros(len(state.tokens))
        state.memory[self, "calm"] = state.commit_step.new_zeros(len(state.tokens))
        state.memory[self, "best"] = torch.full_like(state.commit_step, -1)

    def guide(self, state: DecodeState, logits: Tensor) -> Tensor:
        """[B R V], the logits as they were."""
        state.memory[self, "lead"] = lead(state, logits)
        state.memory[self, "now"] = logits.argmax(-1)
        return logits

    def stop(self, state: DecodeState) -> Tensor:
        """[B] bool."""
        busy, masks = state.open.any(1), state.here(state.masked)
        state.memory[self, "steps"] = done = state.memory[self, "steps"] + busy
        sure = self.aggregate(state.memory[self, "lead"], masks)
        bar = self.bar(done - 1, self.steps or state.asked)
        now, calm = state.memory[self, "now"], state.memory[self, "calm"]
        changed = masks & (now != take(state.memory[self, "best"], state.at - state.prompt))
        # In float64, as the reference: a share such as 0.3 is itself only there.
        share = changed.sum(1).double() / masks.sum(1).clamp(min=1)
        counted = torch.where(share <= self.max_change, calm + 1, 0)
        state.memory[self, "calm"] = calm = torch.where(busy, counted, calm)
        state.put(state.memory[self, "best"], masks & busy[:, None], now, state.prompt)
        return busy & (sure >= bar) & (calm > self.patience)

    def bar(self, done: Tensor, steps: int) -> Tensor:
        """[B] float64, what the statistic must reach.

        Args:
            done: [B] steps done before the current one.
            steps: number of all steps.
        """
        if steps == 1:
            return torch.full_like(done, self.low, dtype=torch.float64)
        u = (done.double() / (steps - 1)).clamp(0, 1)
        if self.high == self.low:  # also where both are infinite and have no difference
            return torch.full_like(u, self.low)
        if self.mode == "linear":
            return self.high + (self.low - self.high) * u
        fall = (1 + (math.pi * u).cos()) / 2 if self.mode == "cosine" else (-self.k * u).exp()
        return self.low + (self.high - self.low) * fall

    def aggregate(self, leads: Tensor, masks: Tensor) -> Tensor:
        """[B] statistic of the leads, -inf for rows without masks.

        Args:
            leads: [B R].
            masks: [B R] bool, which of them count.
        """
        count = masks.sum(1)
        if self.statistic == "mean":
            value = leads.masked_fill(~masks, 0.0).sum(1) / count.clamp(min=1)
        else:
            ranked = leads.masked_fill(~masks, torch.inf).sort(dim=1).values
            last = (count - 1).clamp(min=0)
            place = self.quantile * last.double()
            below = last // 2 if self.statistic == "median" else place.long()
            value, above = (
                ranked.gather(1, at[:, None])[:, 0] for at in (below, (below + 1).minimum(last))
            )
            if self.statistic == "quantile":
                value = value.lerp(above, (place - below).to(value))
        return value.masked_fill(count == 0, -torch.inf)
