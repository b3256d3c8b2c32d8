"""AdaBlock: blocks that end at a predicted delimiter."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from encoders.checks import Cutoff, PositiveInt, UnitFloat
from mmdlm.decoding.delimiters import line_breaks
from mmdlm.decoding.numerics import odds_of
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class AdaBlock(Strategy):
    """AdaBlock: opens blocks that end at the most probable delimiter of their first forward.

    The first forward of a block searches the next `share` of the answer. If the most probable
    delimiter there reaches `threshold`, the block ends after it, else after `size` positions; the
    same forward commits. Best combined with `Threshold`; with a fixed number of steps every block
    has the steps of a block of `size` positions.

    Source: AdaBlock-dLLM (arXiv 2509.26432; lgxi24/AdaBlock-dLLM: llada/generate_adablock.py). A
    block that the first forward finishes costs no further one, as there.

    Args:
        size: positions of a block without a delimiter that reaches `threshold`.
        threshold: probability a delimiter must reach; infinite gives fixed blocks.
        delimiters: token ids; None: the line break of the model's tokenizer. Where there is none, a
            warning is given and all blocks are of `size`.
        share: part of the answer that is searched for a delimiter.
    """

    paper: ClassVar[str] = "AdaBlock-dLLM, arXiv 2509.26432"
    sees: ClassVar = "block"

    size: PositiveInt = 32
    threshold: Cutoff = 0.3
    delimiters: tuple[int, ...] | None = None
    share: UnitFloat = 0.25

    def prepare(self, model: MultimodalDLM, columns: slice | None) -> dict[str, Any]:
        """Token ids of the delimiters."""
        found = line_breaks(model) if self.delimiters is None else list(self.delimiters)
        if self.delimiters is None and not found and self.threshold <= 1:
            warnings.warn(
                "AdaBlock: the model has no tokenizer with a line break, so all blocks are of "
                f"{self.size}; give delimiters=(id, ...)",
                stacklevel=2,
            )
        return {"delimiters": torch.tensor(found, dtype=torch.int64, device=model.device)}

    def plan(self, view: View) -> Tensor:
        """[B L] bool, the block of each row; of a new one the positions it may hold."""
        left, at = view.left, torch.arange(view.length)
        start, reach, _ = self._sizes(view)
        wide = view.answer & (at >= start) & (at < start + reach.clamp(min=self.size))
        stays = (view.plan & left).any(1, keepdim=True)
        return torch.where(stays, view.plan, wide) & left.any(1, keepdim=True)

    def block_size(self, view: View) -> Tensor:
        """[B] int64, that of a block without a delimiter."""
        return torch.full_like(view.asked, self.size)

    def replan(self, view: View) -> Tensor | None:
        """[B L] bool, the block of each row up to the delimiter that was predicted.

        Source: compute_block_length of the reference.
        """
        new = view.block_step == 0
        if not bool(new.any()):
            return None
        start, reach, rest = self._sizes(view)
        ids = view.memory(self)["delimiters"]
        near = (view.at < (start + reach).to(view.device)) & view.open
        odds = view.log_odds.masked_fill(~(torch.isin(view.candidates, ids) & near), -torch.inf)
        best, place = odds.max(1, keepdim=True)
        found = (best >= odds_of(self.threshold)) & (best > -torch.inf)
        cut = torch.where(found, view.at.gather(1, place) + 1, -1).cpu()
        end = torch.where(cut >= 0, cut, start + rest.clamp(max=self.size))
        return view.plan & ((torch.arange(view.length) < end) | ~new[:, None])

    def _sizes(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """[B 1] int64 each: where the next block starts, how far it is searched, what is left."""
        start, lengths = view.left.int().argmax(1, keepdim=True), view.lengths[:, None]
        rest = view.prompt + lengths - start
        return start, torch.minimum(rest, (self.share * lengths).long()), rest
