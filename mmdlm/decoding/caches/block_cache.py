"""Store every finished block by a forward of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.recompute import column_levels, renewed, scored_from
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy, Window


@dataclass(frozen=True)
class BlockCache(Strategy):
    """Computes the open block only; the prompt, and each block once full, get their own forward.

    The logits are those of `Exact`, which stores what is final in the same forward that opens the
    next block, and so needs one forward less per block. This is for counting forwards as published
    samplers do, and for steps whose cost must not vary. A shifted family spends no forward of its
    own where the first position of a block is opened alone (`SubBlocks`): the forward that stores
    a block scores the next one's first position.

    Source: the key/value caches of JetAstra/SDAR: generate.py and
    Efficient-Large-Model/Fast_dLLM_v2_7B: modeling.py (generate). SDAR also stores the last block.
    """

    paper: ClassVar[str] = "SDAR, arXiv 2510.06303"
    exact: ClassVar[bool] = True

    def refresh(self, state: DecodeState) -> Refresh:
        """The rows that are not final, after those that have become so."""
        levels = column_levels(state)
        if levels is None:
            return Refresh(0, state.length, cached=False)
        stale, settled = renewed(state), state.memory["final"]
        first, end = state.window.start - state.model.spec.shift, scored_from(state, levels)
        if stale < settled:
            highest, lowest = levels
            seen = int((lowest <= highest[settled - 1]).nonzero()[-1]) + 1
            if seen < end:
                store = Window(stale, seen)
                return Refresh(min(settled, first), end, cached=True, attend=end, store=store)
        return Refresh(min(stale, first), end, cached=True, attend=end)
