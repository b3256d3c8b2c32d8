"""Keep the keys and values of everything before the open block, for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.compatibility import columns
from mmdlm.decoding.recompute import anew, open_masks
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy


@dataclass(frozen=True)
class FreeCache(Strategy):
    """Recomputes from the open block on; what lies before is never renewed.

    Only the first step is a full pass. A block keeps the keys and values of its last step, in which
    the tokens that this step commits were still masked. Approximate. In a shifted family the row
    before the block, which scores its first position, is always computed with it.

    Source: ZhanqiuHu/flash-dlm-experimental: src/model/llada_v2/generate.py
    (generate_block_cached). A row that has filled its block and waits for others keeps what the
    step that filled it computed, so it goes on as it would alone.

    Args:
        every: a full pass when a block opens and in every so many of its steps; None: never, as
            published.
    """

    paper: ClassVar[str] = "FreeCache, arXiv 2505.21467"
    # Whose blocks lie elsewhere in every row.
    excludes: ClassVar[tuple[str, ...]] = ("AdaBlock", "SubBlocks")

    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"FreeCache.every is {self.every}, expected at least 1")

    def refresh(self, state: DecodeState) -> Refresh:
        """Everything at first, then [block start, L) in rows that still have masks there."""
        start, _ = columns(self, state)
        if not state.caches or (self.every and state.block_step % self.every == 0):
            return anew(state)
        busy = open_masks(state).any(1)
        renew = None if bool(busy.all()) else busy[:, None].expand_as(state.left)
        first = start - int(state.model.spec.shift)
        return Refresh(first, state.length, cached=True, renew=renew)
