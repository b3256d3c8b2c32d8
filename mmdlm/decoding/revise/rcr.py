"""Commit everything, and take back what was least sure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.numerics import rank
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.schedules import left, share
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy, Window


@dataclass(frozen=True)
class RCR(Strategy):
    """Commits all open masks in every step and reopens the least confident tokens for the next.

    How many are open before a step falls from all masks of the block to none as a curve says (see
    `MaskGIT`); which ones depends on the confidence every token had when it was committed, over all
    that is written. So a token of an earlier block can be reopened too, and the window begins at
    the start of the answer. A token that stays keeps its confidence. Costs the forwards of the
    curve's steps, no more.

    In the model's own blocks (block-causal, no `size`) only tokens of the open block are reopened,
    as what comes before was read without the blocks behind it.

    Source: running-confidence remasking of MDPO (arXiv 2508.13148; autonomousvision/mdpo:
    src/mdlm_generation_utils.py, diffusion_generate with rcr).

    Args:
        steps: steps for the whole answer, split evenly over the blocks; None: one per token.
        schedule: name of the curve, see `MaskGIT`.
        size: positions per block, counted from the start of the answer; None: see `Blocks`.
    """

    paper: ClassVar[str] = "MDPO, arXiv 2508.13148"
    # Stopping early would be undone; positions that move lose the confidence they had; where the
    # first position of a shifted family opens again, these caches make all rows of a batch wait.
    excludes: ClassVar[tuple[str, ...]] = ("stop", "resize", "PrefixCache", "DualCache")

    steps: int | None = None
    schedule: str = "linear"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"RCR.steps is {self.steps}, expected at least 1")
        if self.size is not None and self.size < 1:
            raise ValueError(f"RCR.size is {self.size}, expected at least 1")
        share(1, 1, self.schedule)

    def begin(self, state: DecodeState) -> None:
        """Sets up the confidence of each position."""
        state.memory[self, "sure"] = torch.zeros_like(state.commit_confidence)

    def plan(self, state: DecodeState) -> Window:
        """From the start of the answer to the end of the first block that was never filled."""
        block = Blocks(self.size).plan(state)
        if block.start >= block.stop:
            return block
        opened = state.memory.get((self, "block"))
        if block.turn is not None or opened is None or block.start >= opened.stop:
            state.memory[self, "block"] = opened = block
        return opened if opened.turn is not None else Window(state.prompt, opened.stop)

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool."""
        return state.open

    def revise(self, state: DecodeState) -> Tensor:
        """[B L] bool, the tokens of least confidence, as many as the next step opens."""
        sure = state.memory[self, "sure"]
        state.put(sure, state.taken, state.confidence, state.prompt)
        # A row that ended has tokens that no step committed.
        written = (state.commit_step >= 0) & state.within()[:, state.prompt :]
        masks = (state.masked & state.within()).sum(1)
        count = self._open_next(state) - masks
        place = rank((-sure).masked_fill(~written, -torch.inf))
        again = written & (place < count[:, None])
        return torch.nn.functional.pad(again, (state.prompt, 0))

    def _open_next(self, state: DecodeState) -> Tensor:
        """[B] how many masks the curve leaves for the next step."""
        name = (self, "open")
        if state.block_step == 0 or name not in state.memory:
            steps = self.steps or state.length - state.prompt
            start, stop, turn = state.memory[self, "block"]
            share = steps * (stop - start) / (state.length - state.prompt)
            steps = state.share(steps) if turn is not None else max(1, round(share))
            table = [left(n, steps, self.schedule) for n in state.block_masks.tolist()]
            state.memory[name] = torch.tensor(table, device=state.tokens.device)
        table = state.memory[name]
        return table[:, min(state.block_step, table.shape[1] - 1)]
