"""Fast-dLLM PrefixCache: reuse keys and values before the open block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.positions import between, block_pass, span
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class PrefixCache(Strategy):
    """Fast-dLLM PrefixCache: recomputes from the open block on; a full pass opens each block.

    The full pass also commits. Approximate with full attention: within a block, the prompt and the
    blocks before keep the keys and values they had when it opened.

    Source: Fast-dLLM (arXiv 2505.22618; NVlabs/Fast-dLLM: v1/llada/generate.py,
    generate_with_prefix_cache; dream/model/generation_utils_block.py for shifted families). A block
    that its full pass finishes costs no further forward here.
    """

    paper: ClassVar[str] = "Fast-dLLM, arXiv 2505.22618"
    denies: ClassVar[frozenset[str]] = frozenset({"all_scored"})

    def refresh(self, view: View) -> Refresh:
        """All positions that can have changed at the start of a block, then [block start, L)."""
        rest = view.derived("from block on", lambda view: between(view, span(view)[0], view.length))
        return block_pass(view, rest)
