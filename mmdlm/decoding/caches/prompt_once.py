"""Prompt cache: compute the keys and values of the prompt once per answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmdlm.decoding.positions import between, needed, scoring, span
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class PromptOnce(Strategy):
    """Prompt cache: the prompt once, the answer when a block opens, else from the block on.

    `PrefixCache` or `DualCache` without what makes their blocks expensive where the prompt holds
    images or sound: the pass that opens a block covers the answer only. Approximate with full
    attention, since the prompt keeps the keys and values it had when all of the answer was masked;
    with prefix attention, as accurate as those caches. In a shifted family the position before the
    block, which scores its first one, is always computed with it.

    Our own; LaViDa (arXiv 2505.16839) trains its model for a prompt that is run once.

    Args:
        dual: within a block recompute the block only, not the masks after it.
    """

    denies: ClassVar[frozenset[str]] = frozenset({"all_scored"})

    dual: bool = False

    def refresh(self, view: View) -> Refresh:
        """Everything at first, the answer when a block opens, then the block and what follows."""
        start, stop = span(view)
        shift = int(view.model.spec.shift)
        later = between(view, start - shift, stop if self.dual else view.length)
        opens = (view.block_step == 0)[:, None]
        kept = torch.arange(view.length) >= view.prompt - shift
        answer = (needed(view) & kept) | scoring(view)
        compute = torch.where(opens, answer, later)
        return Refresh(torch.where(view.has_cache[:, None], compute, needed(view)))
