"""Fast-dLLM v2 sub-block cache: reuse keys and values outside the open sub-block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmdlm.decoding.positions import heads, scoring_masks
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class SubBlockCache(Strategy):
    """Fast-dLLM v2 sub-block cache: recomputes the open sub-block; a pass over its block opens it.

    In a shifted family the pass over the block is repeated while the first position of the part
    is masked, since the row that scores it lies before. Made for `SubBlocks`; with `Blocks` it does
    to blocks of full attention what `DualCache` does. Approximate: within a part, the rest of the
    block keeps the keys and values it had. Rows of a batch that need different passes get them in
    one forward, each as it would alone.

    Source: `use_block_cache` of Efficient-Large-Model/Fast_dLLM_v2_7B: modeling.py (generate). The
    prompt is stored by the first pass here, not by a separate forward.
    """

    paper: ClassVar[str] = "Fast-dLLM v2, arXiv 2509.26328"
    denies: ClassVar[frozenset[str]] = frozenset({"all_scored"})

    def refresh(self, view: View) -> Refresh:
        """Every row's blocks that are not final up to the open one, or its open part."""
        level, left, scores = view.level, view.left, scoring_masks(view)
        part = view.region.clone()
        head = heads(view)
        part[:, :-1] |= head[:, :-1] & part[:, 1:] & (level[:, :-1] == level[:, 1:])
        top = level.masked_fill(~scores, -1).amax(1, keepdim=True)
        first = part.int().argmax(1, keepdim=True)
        opens = (view.block_step == 0) | ~view.has_cache
        whole = opens[:, None] | (left.gather(1, first) & view.model.spec.shift)
        changed = (level >= view.settled[:, None]) & (level >= 0)
        compute = torch.where(whole, changed, part) & (level <= top)
        return Refresh(compute | scores)
