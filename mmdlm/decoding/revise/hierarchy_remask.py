"""Commit far apart, and doubt again what is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmdlm.decoding.numerics import best_of_runs, check, odds_of, passing, rank
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class HierarchyRemask(Strategy):
    """Commits like `Hierarchy`, and takes back tokens of the window where the model is unsure now.

    A written position is in doubt when the probability of what the model would write there now,
    whether or not that is what stands there, is below `remask`. Doubted positions count as masks:
    those that the rule of `Hierarchy` commits take their new token, the others become masks again.
    At least one more position commits than is in doubt, the most probable ones, so that every step
    leaves fewer masks. Doubt reaches no further than the window, and not to positions that see none
    of its masks (earlier blocks of a block-causal model).

    Ranks by probability, hence decides `score`.

    Source: inclusionAI/dInfer: python/dinfer/decoding/parallel_strategy.py
    (get_transfer_index_hierarchy_remask).

    Args:
        high: as in `Hierarchy`.
        low: as in `Hierarchy`.
        remask: probability below which a written position is in doubt; 0 doubts nothing.
    """

    paper: ClassVar[str] = "dInfer, arXiv 2510.08666"
    sees: ClassVar[Literal["open", "window", "answer"]] = "window"
    # It guarantees progress itself; the best mask may wait while a doubted token beside it commits.
    may_idle: ClassVar[bool] = True

    high: float | None = 0.9
    low: float | None = 0.4
    remask: float = 0.4

    def __post_init__(self) -> None:
        check(self, "high", "low", "remask")

    def score(self, state: DecodeState, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] log-odds."""
        return state.log_odds

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool; also decides what `edit` and `revise` will answer."""
        masks = state.masked & state.within()
        # Positions of a lower level see no mask, and their keys may be kept for good. A row that
        # only waits for others to fill the window has no masks, and so nothing to doubt.
        level = state.sequence.level
        floor = level.masked_fill(~masks, level.max() + 1).amin(1, keepdim=True)
        written = state.writable & ~state.masked & state.within() & (level >= floor)
        doubted = state.here(written) & (state.log_odds < odds_of(self.remask))
        either = state.open | doubted
        member = masks.clone()
        state.put(member, doubted, 1)
        odds = state.log_odds.masked_fill(~either, -torch.inf)
        best = best_of_runs(state, member, either, odds)
        commits = either & passing(state, best, self.high, self.low)
        lacking = (doubted.sum(1) + 1 - commits.sum(1)).clamp(min=0)
        rest = odds.masked_fill(commits, -torch.inf)
        commits = commits | (either & (rank(rest) < lacking[:, None]))
        state.memory[self, "edit"] = doubted & commits
        state.memory[self, "revise"] = doubted & ~commits
        return commits

    def edit(self, state: DecodeState) -> Tensor:
        """[B R] bool, doubted positions that commit."""
        # Absent where `Refresh.fill` decided the step.
        return state.memory.pop((self, "edit"), torch.zeros_like(state.open))

    def revise(self, state: DecodeState) -> Tensor:
        """[B L] bool, the other doubted positions."""
        again = torch.zeros_like(state.tokens, dtype=torch.bool)
        state.put(again, state.memory.pop((self, "revise"), torch.zeros_like(state.open)), 1)
        return again
