"""Keep the keys and values of the prompt for the whole answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.compatibility import columns
from mmdlm.decoding.recompute import anew
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy


@dataclass(frozen=True)
class PromptOnce(Strategy):
    """Recomputes from the open block on, the answer when a block opens, the prompt never again.

    `PrefixCache` or `DualCache` without what makes their blocks expensive where the prompt holds
    images or sound: the pass that opens a block covers the answer only. Approximate with full
    attention, since the prompt keeps the keys and values it had when all of the answer was masked;
    for prompts that do not see the answer as good as those caches. In a shifted family the row
    before the block, which scores its first position, is always computed with it.

    Our own; LaViDa (arXiv 2505.16839) trains its model for a prompt that is run once.

    Args:
        dual: within a block recompute the block only, not the masks behind it.
    """

    # Whose blocks lie elsewhere in every row.
    excludes: ClassVar[tuple[str, ...]] = ("AdaBlock", "SubBlocks")

    dual: bool = False

    def refresh(self, state: DecodeState) -> Refresh:
        """Everything at first, the answer when a block opens, then the block and what follows."""
        start, stop = columns(self, state)
        shift = int(state.model.spec.shift)
        if not state.caches:
            return anew(state)
        if not state.block_step:
            return anew(state, kept=state.prompt - shift)
        return Refresh(start - shift, stop if self.dual else state.length, cached=True)
