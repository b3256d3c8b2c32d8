"""Parts of each block, left to right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.block_order import heads, next_turn
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy, Window


@dataclass(frozen=True)
class SubBlocks(Strategy):
    """Opens the blocks of a model in parts; the rest of the block is seen as masks meanwhile.

    In a shifted family the first position of a block is scored by the last row of the block
    before, which does not see the block. It is opened alone, so that the others are scored with it
    known. As with `Blocks`, a part stays open until every row has filled it.

    Source: `small_block_size` of Efficient-Large-Model/Fast_dLLM_v2_7B: modeling.py (generate).

    Args:
        size: positions per part, counted from the start of the block; a model without blocks has
            its answer opened in parts of this size.
    """

    paper: ClassVar[str] = "Fast-dLLM v2, arXiv 2509.26328"

    size: int = 8

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"SubBlocks.size is {self.size}, expected at least 1")

    def plan(self, state: DecodeState) -> Window:
        """The first part that holds a mask in any row; an empty window when none does."""
        if not state.left.any():
            return Window(state.length, state.length)
        if self not in state.memory:
            state.memory[self] = True
            state.turns, state.turn_size = self._turns(state), self.size
        return next_turn(state)

    def idle(self, length: int) -> bool:
        """A part holds all of the answer."""
        return self.size >= length

    def _turns(self, state: DecodeState) -> Tensor:
        """[B L] int64, two numbers per part: for the first position opened alone, and the rest."""
        spec, answer = state.model.spec, state.length - state.prompt
        block = spec.block_size or answer
        if spec.attention == "block_causal":
            place = state.sequence.positions.cpu() % block
        else:
            place = (torch.arange(state.length) - state.prompt).expand(len(state.tokens), -1)
            place = place % block
        parts = -(-block // self.size)
        turns = (state.turns * parts + place // self.size) * 2 + (~heads(state)).long()
        earlier = state.turns < 0
        if spec.attention != "block_causal":
            earlier[:, : state.prompt] = True  # with full attention the prompt has the same level
        return turns.masked_fill(earlier, -1)
