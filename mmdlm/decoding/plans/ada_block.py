"""Blocks that end where a sentence does."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.block_order import LATER, narrow, next_turn
from mmdlm.decoding.delimiters import line_breaks
from mmdlm.decoding.numerics import odds_of
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy, Window


@dataclass(frozen=True)
class AdaBlock(Strategy):
    """Opens the answer block by block, each up to the surest delimiter predicted ahead.

    The first forward of a block looks at the next `share` of the answer. If the delimiter it
    predicts most surely there reaches `threshold`, the block ends behind it, else after `size`
    positions; the same forward commits. Each row of a batch has blocks of its own, and waits until
    all have filled theirs. The best use is with `Threshold`; with fixed numbers of steps a block
    gets those of one of `size` positions. A cache that follows such blocks is `SubBlockCache`.

    Source: AdaBlock-dLLM (arXiv 2509.26432; lgxi24/AdaBlock-dLLM: llada/generate_adablock.py). A
    block that the first forward finishes costs no further one, as there.

    Args:
        size: positions of a block without a sure delimiter.
        threshold: probability a delimiter must reach; infinite gives fixed blocks.
        delimiters: token ids; None: the line break of the model's tokenizer. Where there is none, a
            warning says so and all blocks are of `size`.
        share: part of the answer that is searched for a delimiter.
    """

    paper: ClassVar[str] = "AdaBlock-dLLM, arXiv 2509.26432"
    sees: ClassVar = "window"

    size: int = 32
    threshold: float = 0.3
    delimiters: tuple[int, ...] | None = None
    share: float = 0.25

    def __post_init__(self) -> None:
        if self.delimiters is not None:
            object.__setattr__(self, "delimiters", tuple(self.delimiters))
        if self.size < 1:
            raise ValueError(f"AdaBlock.size is {self.size}, expected at least 1")
        if not self.threshold >= 0:
            raise ValueError(f"AdaBlock.threshold is {self.threshold}, expected a probability")
        if not 0 <= self.share <= 1:
            raise ValueError(f"AdaBlock.share is {self.share}, expected a part between 0 and 1")

    def begin(self, state: DecodeState) -> None:
        """Looks the delimiters up."""
        found = line_breaks(state.model) if self.delimiters is None else list(self.delimiters)
        if self.delimiters is None and not found and self.threshold <= 1:
            warnings.warn(
                "AdaBlock: the model has no tokenizer with a line break, so all blocks are of "
                f"{self.size}; give delimiters=(id, ...)",
                stacklevel=2,
            )
        state.memory[self, "delimiters"] = found

    def plan(self, state: DecodeState) -> Window:
        """The block of each row, or the widest it may become; an empty window when none is left."""
        if not state.left.any():
            return Window(state.length, state.length)
        if self not in state.memory:
            state.turns = torch.full_like(state.turns, -1)
            state.turns[:, state.prompt :] = LATER
            state.turn_size, state.memory[self] = self.size, -1
        if int(state.turns[state.left].min()) == LATER:
            state.memory[self] += 1
            start, reach, _ = self._sizes(state)
            state.memory[self, "opening"] = True
            at = torch.arange(state.length)
            wide = (at >= start) & (at < start + reach.clamp(min=self.size))
            state.turns = state.turns.masked_fill(wide & (at >= state.prompt), state.memory[self])
        return next_turn(state)

    def stop(self, state: DecodeState) -> Tensor:
        """[B] bool, nothing; this is where predictions are first known, and blocks find their end.

        Source: compute_block_length of the reference.
        """
        if state.memory.pop((self, "opening"), False):
            self._narrow(state)
        return torch.zeros(len(state.tokens), dtype=torch.bool, device=state.tokens.device)

    def _sizes(self, state: DecodeState) -> tuple[Tensor, Tensor, Tensor]:
        """[B 1] int64 each: where the next block starts, how far it is searched, what is left."""
        start = state.left.int().argmax(1, keepdim=True)
        rest = state.length - start
        return start, rest.clamp(max=int(self.share * (state.length - state.prompt))), rest

    def _narrow(self, state: DecodeState) -> None:
        """Ends the block of each row, and closes what lies behind."""
        start, reach, rest = self._sizes(state)
        ids = torch.tensor(state.memory[self, "delimiters"], device=state.at.device)
        near = state.at < (start + reach).to(state.at.device)
        near &= state.open  # what is given there is read, or not, as other rows need it
        sure = state.log_odds.masked_fill(~(torch.isin(state.candidates, ids) & near), -torch.inf)
        best, place = sure.max(1, keepdim=True)
        found = (best >= odds_of(self.threshold)) & (best > -torch.inf)
        cut = torch.where(found, state.at.gather(1, place) + 1, -1).cpu()
        end = torch.where(cut >= 0, cut, start + rest.clamp(max=self.size))
        closed = torch.arange(state.length) >= end
        narrow(state, closed)
