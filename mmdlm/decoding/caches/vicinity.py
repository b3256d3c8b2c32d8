"""Keep the keys and values of everything but the open block and its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.compatibility import columns
from mmdlm.decoding.recompute import anew
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy


@dataclass(frozen=True)
class VicinityCache(Strategy):
    """Recomputes the open block and some rows on either side; a full pass opens each block.

    Neighbours matter most to a block and change most with it, so a dual cache whose block is a
    little larger loses less. All passes commit. Approximate: within a block, what lies farther away
    keeps the keys and values it had when it opened.

    Source: inclusionAI/dInfer: python/dinfer/decoding/generate_uniform.py (VicinityCacheIteration,
    `prefix_look`, `after_look`, `warmup_steps`; `cache_update_freq` is `every`). It counts steps
    from the start of the answer; here they count from the start of the block, and warming up ends
    with the first block, so that a row does the same alone and in a batch. A block that its full
    pass finishes costs no further forward, and a shifted family has the row before the block
    computed with it instead of a window moved by one.

    Args:
        before: rows recomputed before the block.
        after: rows recomputed behind it.
        every: a full pass in every so many steps of a block too; None: only when it opens.
        warmup: full passes in so many first steps of the first block.
    """

    paper: ClassVar[str] = "dInfer, arXiv 2510.08666"
    # Whose blocks lie elsewhere in every row.
    excludes: ClassVar[tuple[str, ...]] = ("AdaBlock", "SubBlocks")

    before: int = 16
    after: int = 16
    every: int | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        for name in ("before", "after", "warmup"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"VicinityCache.{name} is {value}, expected at least 0")
        if self.every is not None and self.every < 1:
            raise ValueError(f"VicinityCache.every is {self.every}, expected at least 1")

    def refresh(self, state: DecodeState) -> Refresh:
        """All rows that can have changed, or those from `before` to `after` the block."""
        start, stop = columns(self, state)
        first_block = start == state.prompt
        if (
            not state.caches
            or state.block_step % (self.every or state.length) == 0
            or (first_block and state.block_step < self.warmup)
        ):
            return anew(state)
        # What is final (see `Exact`) does not get better by being near.
        near = max(start - self.before, state.memory.get("final", 0))
        first = min(near, start - int(state.model.spec.shift))
        return Refresh(first, min(stop + self.after, state.length), cached=True)
