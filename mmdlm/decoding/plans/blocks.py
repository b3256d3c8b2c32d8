"""Fixed blocks, left to right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.block_order import next_turn
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy, Window


@dataclass(frozen=True)
class Blocks(Strategy):
    """Opens the answer block by block; a block stays open until every row has filled it.

    Rows that finish a block early wait for the others, so a row's result is the one it has alone
    whatever cache is used.

    Source: semi-autoregressive remasking of LLaDA (ML-GSAI/LLaDA: generate.py); the own blocks of
    block-causal models as in JetAstra/SDAR: generate.py.

    Args:
        size: positions per block, counted from the start of the answer. None takes the model's own
            block size, and opens the whole answer at once where it has none; a block-causal model
            counts its blocks from the start of the text, so that the first holds the end of the
            prompt.
    """

    paper: ClassVar[str] = "LLaDA, arXiv 2502.09992"
    steady: ClassVar[bool] = True

    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"Blocks.size is {self.size}, expected at least 1")

    def plan(self, state: DecodeState) -> Window:
        """The first block that holds a mask in any row; an empty window when none does."""
        left = state.left.any(0).nonzero()
        if not len(left):
            return Window(state.length, state.length)
        spec = state.model.spec
        if self.size is None and spec.attention == "block_causal":
            state.turn_size = spec.block_size
            return next_turn(state)
        whole = max(state.length - state.prompt, state.asked)
        size = self.size or spec.block_size or whole
        start = state.prompt + (int(left[0]) - state.prompt) // size * size
        state.turn_size = min(size, state.prompt + whole - start)
        return Window(start, min(start + size, state.length))

    def idle(self, length: int) -> bool:
        """A block holds all of the answer."""
        return self.size is not None and self.size >= length
