"""FreeCache: reuse keys and values before the open block for the rest of the decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from encoders.checks import PositiveInt
from mmdlm.decoding.positions import between, needed, span
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class FreeCache(Strategy):
    """FreeCache: recomputes from the open block on; positions before it are never recomputed.

    Only the first step is a full pass. A block keeps the keys and values of its last step, in which
    the tokens that this step commits were still masked. Approximate. In a shifted family the
    position before the block, which scores its first one, is always computed with it.

    Source: ZhanqiuHu/flash-dlm-experimental: src/model/llada_v2/generate.py
    (generate_block_cached).

    Args:
        every: steps of a block from one full pass to the next, the first of which opens it; None:
            there is none, as published.
    """

    paper: ClassVar[str] = "FreeCache, arXiv 2505.21467"
    denies: ClassVar[frozenset[str]] = frozenset({"all_scored"})

    every: PositiveInt | None = None

    def refresh(self, view: View) -> Refresh:
        """Everything at first, then [block start, L) in each row."""
        full = ~view.has_cache
        if self.every is not None:
            full = full | (view.block_step % self.every == 0)
        if bool(full.all()):
            return Refresh(needed(view))
        later = between(view, span(view)[0] - int(view.model.spec.shift), view.length)
        return Refresh(torch.where(full[:, None], needed(view), later))
