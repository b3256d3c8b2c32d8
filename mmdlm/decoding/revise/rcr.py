"""Running-confidence remasking: commit all masks, remask the least confident tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.checks import PositiveInt
from mmdlm.decoding.memory import Entry, PerAnswer
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.positions import fixed_blocks, full_size, span
from mmdlm.decoding.schedules import share
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class RCR(Strategy):
    """MDPO running-confidence remasking: commits all masks, remasks the least confident.

    The number of masks before a step falls from all of the block to none along a curve (see
    `MaskGIT`). Remasked are the tokens of the lowest confidence at the time of their commit, among
    all written ones: a token of an earlier block can be remasked too, so the open positions begin
    at the start of the answer. A token that stays keeps its confidence. Takes one forward per step
    of the curve.

    With the model's own blocks (block-causal, no `size`) only tokens of the open block are
    remasked, as earlier blocks do not attend to it.

    Source: running-confidence remasking of MDPO (arXiv 2508.13148; autonomousvision/mdpo:
    src/mdlm_generation_utils.py, diffusion_generate with rcr).

    Args:
        steps: steps for the whole answer, split evenly over the blocks; None: one per token.
        schedule: name of the curve, see `MaskGIT`.
        size: positions per block, counted from the start of the answer; None: see `Blocks`.
    """

    paper: ClassVar[str] = "MDPO, arXiv 2508.13148"
    # An early exit would be undone; the curve is that of a fixed number of positions.
    requires: ClassVar[frozenset[str]] = frozenset({"fixed_length", "own_schedule"})

    steps: PositiveInt | None = None
    schedule: str = "linear"
    size: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share(1, 1, self.schedule)

    def begin(self, view: View) -> dict[str, Entry]:
        """The confidence of each position at its commit."""
        return {"confidence": PerAnswer(torch.zeros_like(view.commit_confidence))}

    def plan(self, view: View) -> Tensor:
        """[B L] bool, from the start of the answer to the end of the first unfinished block."""
        block = fixed_blocks(view, self.size)
        if self._own_blocks(view):
            return block
        end = view.length - block.flip(1).int().argmax(1, keepdim=True)
        new = view.answer & (torch.arange(view.length) < end) & block.any(1, keepdim=True)
        # A mask before the end of the open block was remasked.
        return torch.where((view.plan & block).any(1, keepdim=True), view.plan, new)

    def block_size(self, view: View) -> Tensor:
        """[B] int64, positions of the last block that each row has opened."""
        if self._own_blocks(view):
            return full_size(view, self.size)
        count = span(view)[1][:, 0] - view.prompt
        size = self.size or view.model.spec.block_size
        return count if size is None else count - (count - 1) // size * size

    def select(self, view: View) -> Tensor:
        """[B R] bool, all open masks."""
        return view.open

    def revise(self, view: View) -> Tensor:
        """[B L] bool, the least confident tokens, so that the next step has its number of masks."""
        mine = view.memory(self)
        known = view.placed(mine["confidence"], view.taken, view.confidence, view.prompt)
        mine["confidence"] = known
        # A row that ended has tokens that no step committed.
        written = (view.commit_step >= 0) & view.opened[:, view.prompt :]
        masks = (view.masked & view.opened).sum(1)
        count = self._remaining(view).to(view.device) - masks
        place = rank((-known).masked_fill(~written, -torch.inf))
        again = written & (place < count[:, None])
        return F.pad(again, (view.prompt, 0))

    def _own_blocks(self, view: View) -> bool:
        """Whether the blocks are those of the model's attention."""
        return self.size is None and view.model.spec.attention == "block_causal"

    def _remaining(self, view: View) -> Tensor:
        """[B] host int64, masks that the curve leaves each row for the next step."""
        steps = view.share(view.asked if self.steps is None else self.steps)
        clocks = (view.block_masks.tolist(), steps.tolist(), view.block_step.tolist())
        return torch.tensor(
            [
                int(masks * share(min(now + 1, last) / last, masks, self.schedule))
                for masks, last, now in zip(*clocks, strict=True)
            ]
        )
