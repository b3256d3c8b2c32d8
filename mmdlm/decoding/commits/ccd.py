"""CCD: commit positions whose prediction is consistent over two steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoders.checks import NonNegativeFloat, PositiveInt
from mmdlm.backbones.kv import take
from mmdlm.decoding.memory import Entry, PerAnswer, PerRow
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class CCD(Strategy):
    """CCD: commits positions among the best whose candidate is that of the step before.

    A block of n positions in S steps commits n // S per step; that number is due. Every step also
    notes the best positions that it does not commit. A position agrees if it is among the best now,
    was noted in the step before and has kept its candidate. Positions that agree commit in place of
    the best ones: all of them with `dynamic` (CCD-DS), else the number due. The best commit
    instead if fewer agree than are due, or if none of the best was noted. They also commit in the
    first `warm_up` steps. The last step commits all that is left.

    One position is noted in the first steps. From step `warm_up` on it is one more per step, up to
    due + int(due * expand), and two once a tenth of the block is left. Extra memory: 9 bytes per
    position of the answer. Use it with `Entropy`, the ranking of the paper.

    Source: CCD (arXiv 2512.02044; tonyckc/CCD-DLM-code: model.py, _sample_inference_lookahead).
    This is the released algorithm, which compares with one earlier step; the paper averages over
    several. With steps that do not divide the block the reference leaves masks; here the last step
    fills them.

    Args:
        steps: steps for the whole answer, split evenly over the blocks; None: one per token.
        dynamic: commit all that agree, so that fewer steps are needed.
        expand: how many more are noted than are due, as a multiple of the number due.
        warm_up: steps at the start of a block that commit by confidence alone.
    """

    paper: ClassVar[str] = "CCD, arXiv 2512.02044"
    may_idle: ClassVar[bool] = True  # it commits in every step, but not always the best position

    steps: PositiveInt | None = None
    dynamic: bool = False
    expand: NonNegativeFloat = 4.0
    warm_up: PositiveInt = 5

    def begin(self, view: View) -> dict[str, Entry]:
        """Nothing is noted yet; `noted` and `before` are those of the latest step."""
        none = torch.full_like(view.commit_step, -1)
        return {
            "noted": PerAnswer(torch.zeros_like(none, dtype=torch.bool), fill=False),
            "before": PerAnswer(none, fill=-1),
            "size": PerRow(none.new_ones(len(none))),
        }

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        steps = view.share(view.asked if self.steps is None else self.steps)
        due = (view.block_size // steps).clamp(min=1)
        size = self._size(view, due)[:, None]
        due = due.to(view.device)[:, None]
        last = (view.block_step >= steps - 1).to(view.device)[:, None]
        warm = (view.block_step >= self.warm_up).to(view.device)[:, None]
        mine, at, is_open = view.memory(self), view.at - view.prompt, view.open
        place = rank(view.confidence)
        best = is_open & (place < due)
        noted = is_open & take(mine["noted"], at)
        agrees = noted & (place < size) & (view.candidates == take(mine["before"], at))
        enough = (best & noted).any(1, keepdim=True) & (agrees.sum(1, keepdim=True) >= due)
        if not self.dynamic:
            agrees &= _place(view, agrees) < due
        taken = torch.where(warm & enough, agrees, best)
        taken = torch.where(last, is_open, taken)
        self._note(view, is_open & ~taken, size)
        return taken

    def _size(self, view: View, due: Tensor) -> Tensor:
        """[B] how many positions each row considers and notes in this step."""
        mine, masks = view.memory(self), view.open.sum(1)
        late = masks <= (0.1 * view.block_size.double()).to(view.device)
        most = (due + (due.double() * self.expand).long()).to(view.device)
        grown = (torch.where(late, 1, mine["size"]) + 1).minimum(most)
        first = (view.block_step < max(1, self.warm_up - 1)).to(view.device)
        # Rows with nothing open do not select in this step; alone they would not get here.
        mine["size"] = torch.where(masks > 0, torch.where(first, 1, grown), mine["size"])
        return mine["size"]

    def _note(self, view: View, rest: Tensor, size: Tensor) -> None:
        """Notes the best of the rest [B R] bool, `size` [B 1] per row, and all candidates."""
        mine, is_open = view.memory(self), view.open
        noted = mine["noted"] & ~is_open.any(1, keepdim=True)
        best = rest & (_place(view, rest) < size)
        mine["noted"] = view.placed(noted, best, True, view.prompt)
        mine["before"] = view.placed(mine["before"], is_open, view.candidates, view.prompt)


def _place(view: View, chosen: Tensor) -> Tensor:
    """[B R] rank among the chosen positions; the others rank after them."""
    return rank(view.confidence.masked_fill(~chosen, -torch.inf))
