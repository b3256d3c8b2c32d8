"""Fast-dLLM DualCache: reuse keys and values before and after the open block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.positions import between, block_pass, span
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class DualCache(Strategy):
    """Fast-dLLM DualCache: recomputes the open block only; a full pass opens each block.

    The full pass also commits. Approximate: within a block, what comes before it and the masks
    after it keep the keys and values they had when it opened.

    Source: Fast-dLLM (arXiv 2505.22618; NVlabs/Fast-dLLM: v1/llada/generate.py,
    generate_with_dual_cache; dream/model/generation_utils_block.py for shifted families).
    """

    paper: ClassVar[str] = "Fast-dLLM, arXiv 2505.22618"
    denies: ClassVar[frozenset[str]] = frozenset({"all_scored"})

    def refresh(self, view: View) -> Refresh:
        """All positions that can have changed at the start of a block, then the block."""
        block = view.derived("block", lambda view: between(view, *span(view)))
        return block_pass(view, block)
