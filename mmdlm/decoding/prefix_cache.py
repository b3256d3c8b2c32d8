"""Keep the keys and values of everything before the open block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.exact import renewed
from mmdlm.decoding.refusals import columns
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy, Window


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


def full_pass(cache: Strategy, state: DecodeState) -> Refresh | None:
    """The recomputation that opens a block; None within the block.

    In a shifted family the row before the block scores its first position. That row is not among
    those recomputed within the block, so the full pass fills this position and nothing else.

    Args:
        cache: who asks.
        state: the run.
    Raises:
        ValueError: see `columns`.
    """
    start, _ = columns(cache, state)
    shift = state.model.spec.shift
    stuck = shift and bool(state.looked[:, start].any()) and bool(state.left[:, start].any())
    if state.block_step and not stuck and state.caches:  # a new length empties them
        return None
    first = min(renewed(state), start - shift)
    fill = Window(start, start + 1) if stuck else None
    return Refresh(first, state.length, cached=True, fill=fill)
