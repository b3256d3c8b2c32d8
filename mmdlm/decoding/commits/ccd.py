"""Commit what was promising a step ago and is promising still."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.backbones.kv import take
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class CCD(Strategy):
    """Commits the positions that stay in the lead with the token they had in the step before.

    A window of n positions in S steps owes n // S per step. Every step notes the next best
    positions behind those it commits. Of the positions in the lead now, those that were noted and
    keep their candidate commit instead of the best ones: all of them with `dynamic` (CCD-DS), else
    as many as are due. Where fewer agree than are due, or none of the best was noted, the best
    commit; so they do in the first `warm_up` steps and in the last one, which commits whatever is
    left.

    One is noted in the first steps; from step `warm_up` on one more per step, up to due + int(due *
    expand); two once a tenth of the window is left. Extra memory: 9 bytes per position of the
    answer. Use it with `Entropy`, the ranking of the paper.

    Source: CCD (arXiv 2512.02044; tonyckc/CCD-DLM-code: model.py, _sample_inference_lookahead),
    the released algorithm: it looks back one step, where the paper averages over several. With
    steps that do not divide the window the reference leaves masks; here the last step fills them.

    Args:
        steps: steps for the whole answer, split evenly over the blocks; None: one per token.
        dynamic: commit all that agree, so that fewer steps are needed.
        expand: how many more are noted than are due, as a multiple of that.
        warm_up: steps at the start of a window that commit by confidence alone.
    """

    paper: ClassVar[str] = "CCD, arXiv 2512.02044"
    may_idle: ClassVar[bool] = True  # never does, but what it commits may leave out the best one

    steps: int | None = None
    dynamic: bool = False
    expand: float = 4.0
    warm_up: int = 5

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"CCD.steps is {self.steps}, expected at least 1")
        if not self.expand >= 0:
            raise ValueError(f"CCD.expand is {self.expand}, expected 0 or more")
        if self.warm_up < 1:
            raise ValueError(
                f"CCD.warm_up is {self.warm_up}, expected at least 1: the first step has no history"
            )

    def begin(self, state: DecodeState) -> None:
        """Sets up the notes of each position."""
        noted = torch.zeros_like(state.commit_step, dtype=torch.bool)
        state.memory[self, "noted"] = noted
        state.memory[self, "before"] = torch.full_like(state.commit_step, -1)
        state.memory[self, "size"] = state.commit_step.new_ones(len(noted))

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool."""
        steps, now = state.share(self.steps or state.asked), state.block_step
        due, is_open = max(1, state.size // steps), state.open
        size = self._size(state, due)[:, None]
        noted, before = (state.memory[self, name] for name in ("noted", "before"))
        place = rank(state.confidence)
        best = is_open & (place < due)
        taken = best
        if now >= steps - 1:
            taken = is_open
        elif now >= self.warm_up:
            at = state.at - state.prompt
            known = is_open & take(noted, at)
            stays = known & (place < size) & (state.candidates == take(before, at))
            agreed = (best & known).any(1) & (stays.sum(1) >= due)
            if not self.dynamic:
                stays &= _place(state, stays) < due
            taken = torch.where(agreed[:, None], stays, best)
        rest = is_open & ~taken
        noted.zero_()
        state.put(noted, rest & (_place(state, rest) < size), True, state.prompt)
        state.put(before, is_open, state.candidates, state.prompt)
        return taken

    def _size(self, state: DecodeState, due: int) -> Tensor:
        """[B] how many positions each row considers and notes in this step."""
        size, masks = state.memory[self, "size"], state.open.sum(1)
        late = masks.double() <= 0.1 * state.size
        if state.block_step < max(1, self.warm_up - 1):
            size = torch.ones_like(size)
        else:
            most = due + int(due * self.expand)
            size = (torch.where(late, 1, size) + 1).clamp(max=most)
        state.memory[self, "size"] = size
        return size


def _place(state: DecodeState, chosen: Tensor) -> Tensor:
    """[B R] rank among the chosen positions; behind them all for the others."""
    return rank(state.confidence.masked_fill(~chosen, -torch.inf))
