"""Keep the keys and values of everything outside the open part of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.block_order import heads
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy


@dataclass(frozen=True)
class SubBlockCache(Strategy):
    """Recomputes the open window only; a pass over its whole block when it opens renews the rest.

    In a shifted family the pass over the block is repeated while the first position of the window
    is masked, since the row that scores it lies before. Made for `SubBlocks`; with `Blocks` it does
    to blocks of full attention what `DualCache` does. Approximate: within a window, the rest of the
    block keeps the keys and values it had. Rows of a batch that need different passes get them in
    one forward, each as it would alone.

    Source: `use_block_cache` of Efficient-Large-Model/Fast_dLLM_v2_7B: modeling.py (generate). The
    prompt is stored by the first pass here, not by a forward of its own.
    """

    paper: ClassVar[str] = "Fast-dLLM v2, arXiv 2509.26328"

    def refresh(self, state: DecodeState) -> Refresh:
        """Every row's blocks that are not final up to the open one, or its window."""
        level, shift = state.level, int(state.model.spec.shift)
        part, is_open = _window(state)
        busy = is_open.any(1, keepdim=True)
        scoring = is_open.roll(-shift, 1)
        top = level.masked_fill(~scoring, -1).amax(1, keepdim=True)
        # Rows without a mask have left, so every row has a first one; all before it is known.
        floor = level.gather(1, state.left.int().argmax(1, keepdim=True))
        final = state.memory.get("final level", torch.zeros_like(floor)).minimum(floor)
        whole = busy
        if state.block_step:
            first = part.int().argmax(1, keepdim=True)
            whole = busy & (shift > 0) & state.left.gather(1, first)
        renew = torch.where(whole, level >= final, part) & (level <= top) & busy
        state.memory["final level"] = torch.where(whole, floor.minimum(top + 1), final)
        at = (renew | scoring).any(0).nonzero()
        start, stop = int(at[0]), int(at[-1]) + 1
        end = int(((level >= 0) & (level <= top)).any(0).nonzero()[-1]) + 1
        same = bool(renew[:, start:stop].all())
        return Refresh(start, stop, cached=True, attend=end, renew=None if same else renew)


def _window(state: DecodeState) -> tuple[Tensor, Tensor]:
    """What each row has of the window, and the masks in it: [B L] bool on the CPU, both.

    The end of the prompt belongs to the part it lies in, and so does a first position that
    `SubBlocks` has opened alone.
    """
    start, stop, turn = state.window
    if turn is None:
        part = torch.zeros_like(state.left)
        part[:, start:stop] = True
        return part, part & state.left
    part = state.turns == turn
    is_open = part & state.left
    head = heads(state)
    part[:, :-1] |= head[:, :-1] & part[:, 1:]
    return part, is_open
