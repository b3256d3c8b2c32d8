"""Keep the keys and values of everything before the open block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.recompute import full_pass
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy


@dataclass(frozen=True)
class PrefixCache(Strategy):
    """Recomputes from the open block on; a full pass at the start of each block renews the rest.

    The full pass also commits. Approximate with full attention: within a block, the prompt and the
    blocks before keep the keys and values they had when it opened.

    Source: Fast-dLLM (arXiv 2505.22618; NVlabs/Fast-dLLM: v1/llada/generate.py,
    generate_with_prefix_cache; dream/model/generation_utils_block.py for shifted families). A block
    that its full pass finishes costs no further forward here.
    """

    paper: ClassVar[str] = "Fast-dLLM, arXiv 2505.22618"
    # Whose blocks lie elsewhere in every row.
    excludes: ClassVar[tuple[str, ...]] = ("AdaBlock", "SubBlocks")

    def refresh(self, state: DecodeState) -> Refresh:
        """All rows that can have changed at the start of a block, then [block start, L)."""
        return full_pass(self, state) or Refresh(state.window.start, state.length, cached=True)
