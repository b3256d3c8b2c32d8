"""Fast-dLLM v2 sub-blocks: parts of each block, left to right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoders.checks import PositiveInt
from mmdlm.decoding.positions import heads, numbered
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class SubBlocks(Strategy):
    """Fast-dLLM v2 sub-blocks: opens each block in parts; the rest of the block stays masked.

    In a shifted family the first position of a block is scored by the last row of the block
    before, which does not see the block. It is opened alone, so that the others are scored with it
    known.

    Source: `small_block_size` of Efficient-Large-Model/Fast_dLLM_v2_7B: modeling.py (generate).

    Args:
        size: positions per part, counted from the start of the block; a model without blocks has
            its answer opened in parts of this size.
    """

    paper: ClassVar[str] = "Fast-dLLM v2, arXiv 2509.26328"

    steady: ClassVar[bool] = True

    size: PositiveInt = 8

    def plan(self, view: View) -> Tensor:
        """[B L] bool, the first part of each row that holds a mask."""
        return numbered(view, self._numbers(view))

    def block_size(self, view: View) -> Tensor:
        """[B] int64, the size of a part."""
        return torch.full_like(view.asked, self.size)

    def idle(self, length: int) -> bool:
        """A part holds all of the answer."""
        return self.size >= length

    def _numbers(self, view: View) -> Tensor:
        """[B L] int64, two numbers per part: for the first position opened alone, and the rest."""
        spec, level, start = view.model.spec, view.level, view.prompt
        own = spec.attention == "block_causal"
        block = spec.block_size or view.length - start
        if own:
            place = view.sequence.positions.cpu() % block
        else:
            place = ((torch.arange(view.length) - start) % block).expand(level.shape)
        parts = -(-block // self.size)
        order = level - level[:, start : start + 1]
        earlier = (order < 0) | (level < 0)
        if not own:
            earlier[:, :start] = True  # with full attention the prompt has the same level
        numbers = (order * parts + place // self.size) * 2 + (~heads(view)).long()
        return numbers.masked_fill(earlier, -1)
