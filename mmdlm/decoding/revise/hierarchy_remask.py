"""dInfer hierarchical decoding with remasking of uncertain tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from encoders.checks import Cutoff
from mmdlm.decoding.memory import Entry, PerCanvas
from mmdlm.decoding.numerics import best_of_runs, odds_of, passing, rank
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class HierarchyRemask(Strategy):
    """dInfer hierarchical remasking: commits like `Hierarchy`, remasks tokens of low probability.

    A written position is uncertain if the probability of its candidate, whether or not that is the
    written token, is below `remask`. Uncertain positions are treated as masks: those that the rule
    of `Hierarchy` commits take their candidate, the others become masks again. At least one more
    position commits than is uncertain, the most probable ones, so that every step leaves fewer
    masks. Only positions of the open block that see one of its masks are checked.

    Ranks by probability, hence decides `score`.

    Source: inclusionAI/dInfer: python/dinfer/decoding/parallel_strategy.py
    (get_transfer_index_hierarchy_remask).

    Args:
        high: as in `Hierarchy`.
        low: as in `Hierarchy`.
        remask: probability below which a written position is uncertain; 0: none is.
    """

    paper: ClassVar[str] = "dInfer, arXiv 2510.08666"
    sees: ClassVar[Literal["block"]] = "block"
    # It makes progress by itself; an uncertain token may commit instead of the best mask beside it.
    may_idle: ClassVar[bool] = True

    high: Cutoff | None = 0.9
    low: Cutoff | None = 0.4
    remask: Cutoff = 0.4

    def begin(self, view: View) -> dict[str, Entry]:
        """No position is edited or remasked."""
        none = torch.zeros_like(view.masked)
        return {"edit": PerCanvas(none, fill=False), "revise": PerCanvas(none, fill=False)}

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] log-odds."""
        return view.log_odds

    def select(self, view: View) -> Tensor:
        """[B R] bool; also decides what `edit` and `revise` return."""
        masks = view.masked & view.opened
        # Positions of a lower level see no mask, and their keys may be final.
        level = view.sequence.level
        floor = level.masked_fill(~masks, level.max() + 1).amin(1, keepdim=True)
        written = view.writable & ~view.masked & view.opened & (level >= floor)
        uncertain = view.here(written) & (view.log_odds < odds_of(self.remask))
        either = view.open | uncertain
        odds = view.log_odds.masked_fill(~either, -torch.inf)
        best = best_of_runs(view, view.placed(masks, uncertain, True), either, odds)
        commits = either & passing(view, best, self.high, self.low)
        lacking = (uncertain.sum(1) + 1 - commits.sum(1)).clamp(min=0)
        rest = odds.masked_fill(commits, -torch.inf)
        commits = commits | (either & (rank(rest) < lacking[:, None]))
        mine, none = view.memory(self), torch.zeros_like(masks)
        mine["edit"] = view.placed(none, uncertain & commits, True)
        mine["revise"] = view.placed(none, uncertain & ~commits, True)
        return commits

    def edit(self, view: View) -> Tensor:
        """[B R] bool, uncertain positions that commit."""
        return view.here(self._taken(view, "edit"))

    def revise(self, view: View) -> Tensor:
        """[B L] bool, the other uncertain positions."""
        return self._taken(view, "revise")

    def _taken(self, view: View, name: str) -> Tensor:
        """[B L] bool of the latest `select`, which are used once."""
        # Where `Refresh.only` decides the step for all rows, `select` is not called.
        mine = view.memory(self)
        flags = mine[name]
        mine[name] = torch.zeros_like(flags)
        return flags
