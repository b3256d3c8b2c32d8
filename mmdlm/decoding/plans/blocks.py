"""Semi-autoregressive blocks of a fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from encoders.checks import PositiveInt
from mmdlm.decoding.positions import fixed_blocks, full_size
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Blocks(Strategy):
    """Semi-autoregressive decoding: opens blocks of a fixed size, left to right in every row.

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

    size: PositiveInt | None = None

    def plan(self, view: View) -> Tensor:
        """[B L] bool, the block of each row's first mask."""
        return fixed_blocks(view, self.size)

    def block_size(self, view: View) -> Tensor:
        """[B] int64, positions of each row's block before answers were cut."""
        return full_size(view, self.size)

    def idle(self, length: int) -> bool:
        """A block holds all of the answer."""
        return self.size is not None and self.size >= length
