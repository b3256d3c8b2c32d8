"""Keep the keys and values of everything outside the open block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.recompute import full_pass
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy


@dataclass(frozen=True)
class DualCache(Strategy):
    """Recomputes the open block only; a full pass at the start of each block renews the rest.

    The full pass also commits. Approximate: within a block, what comes before it and the masks
    behind it keep the keys and values they had when it opened.

    Source: Fast-dLLM (arXiv 2505.22618; NVlabs/Fast-dLLM: v1/llada/generate.py,
    generate_with_dual_cache; dream/model/generation_utils_block.py for shifted families).
    """

    paper: ClassVar[str] = "Fast-dLLM, arXiv 2505.22618"
    # Whose blocks lie elsewhere in every row.
    excludes: ClassVar[tuple[str, ...]] = ("AdaBlock", "SubBlocks")

    def refresh(self, state: DecodeState) -> Refresh:
        """All rows that can have changed at the start of a block, then the block."""
        start, stop, _ = state.window
        return full_pass(self, state) or Refresh(start, stop, cached=True)
