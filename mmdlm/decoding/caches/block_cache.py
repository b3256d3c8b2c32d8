"""Block cache of SDAR: a separate forward stores every finished block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.positions import highest, needed, scoring
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class BlockCache(Strategy):
    """SDAR block cache: computes the open block; separate forwards store prompt and full blocks.

    The logits are those of `Exact`, which stores what is final in the same forward that opens the
    next block, and so needs one forward less per block. This is for counting forwards as published
    samplers do, and for steps whose cost must not vary. A shifted family spends no separate forward
    where the first position of a block is opened alone (`SubBlocks`): the forward that stores a
    block scores the next one's first position.

    Source: the key/value caches of JetAstra/SDAR: generate.py and
    Efficient-Large-Model/Fast_dLLM_v2_7B: modeling.py (generate). SDAR also stores the last block.
    """

    paper: ClassVar[str] = "SDAR, arXiv 2510.06303"
    exact: ClassVar[bool] = True

    def refresh(self, view: View) -> Refresh:
        """The positions that are not final, after a forward over those that have become so."""
        if view.one_level:
            return Refresh(view.level >= 0, cached=False)
        level = view.level
        floor = level.gather(1, view.left_before.int().argmax(1, keepdim=True))
        prefill = (level >= view.settled[:, None]) & (level < floor) & (highest(view) >= floor)
        compute = needed(view)
        if not bool(prefill.any()):
            return Refresh(compute)
        return Refresh((compute & ~prefill) | scoring(view), prefill=prefill)
