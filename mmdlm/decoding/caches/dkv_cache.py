"""dKV-Cache: reuse the keys and values of tokens one step after their commit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from encoders.checks import PositiveInt
from mmdlm.decoding.memory import Entry, PerCanvas
from mmdlm.decoding.positions import highest, needed
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class DKVCache(Strategy):
    """dKV-Cache: recomputes masks and the tokens of the latest step; full passes renew the rest.

    The keys and values of a token change most in the step after its commit, in which the model sees
    it for the first time. So they are kept with one step of delay: a token is computed once more as
    itself, and reused from the step after that. Approximate between full passes. The first step of
    a block is a full pass; so is the second in families without a shift, as published.

    Any commit rule works at any batch size. The published code needs the same number of known
    tokens in every row, and so forbids thresholds; here every row has its own list of positions.

    With `prefill` the prompt is computed once for the whole answer (dKV-Cache-PD); without `decode`
    only the prompt is kept (dKV-Cache-Prefill).

    In a shifted family the position before a token scores it, and what is kept is chosen with this
    in mind. A third variant of the published code, `right`, keeps every known token, and so leaves
    masks after a known token without a score until the next full pass; it is not offered.

    Source: horseee/dKV-Cache: generation_utils/llada_dkv_cache_decode.py, and for shifted families
    generation_utils/dream_generation_utils.py and dream_generation_utils_pd.py.

    Args:
        every: steps of a block from one full pass to the next.
        prefill: the prompt is never renewed.
        decode: known tokens of the answer (and the prompt) are reused.
        variant: positions kept in a shifted family. "un": those whose next position is known,
            whatever they hold; "un_right": of these, those that are known themselves.
    """

    paper: ClassVar[str] = "dKV-Cache, arXiv 2505.15781"
    requires: ClassVar[frozenset[str]] = frozenset({"final_tokens"})
    denies: ClassVar[frozenset[str]] = frozenset({"all_scored"})

    every: PositiveInt = 8
    prefill: bool = False
    decode: bool = True
    variant: Literal["un", "un_right"] = "un"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.prefill or self.decode):
            raise ValueError("DKVCache keeps nothing; expected prefill=True, decode=True or both")

    def begin(self, view: View) -> dict[str, Entry]:
        """The tokens known when the latest step began; padding counts as known."""
        return {"known": PerCanvas(torch.ones_like(view.left), fill=True)}

    def refresh(self, view: View) -> Refresh:
        """All that can have changed, or what was not known when the step before began."""
        mine, shift, known = view.memory(self), int(view.model.spec.shift), ~view.left
        old = mine["known"] & known  # a token may have been taken back
        mine["known"] = known
        step = view.block_step
        full = ~view.has_cache | (step % self.every == 0) | (step < 2 - shift)
        compute = needed(view)
        if self.decode and not bool(full.all()):
            part = ~self._kept(view, old) & (view.level >= 0) & (view.level <= highest(view))
            compute = torch.where(full[:, None], compute, part)
        if self.prefill:
            inside = torch.arange(view.length) < view.prompt - shift
            compute = compute & ~(inside & view.has_cache[:, None])
        return Refresh(compute)

    def _kept(self, view: View, old: Tensor) -> Tensor:
        """[B L] bool, positions whose keys and values are reused.

        Args:
            view: the rows.
            old: [B L] bool, tokens known for a step.
        """
        if not view.model.spec.shift:
            return old
        last = torch.arange(view.length) == (view.prompt + view.lengths - 1)[:, None]
        if self.variant == "un":
            return old.roll(-1, 1) | last  # which scores nothing
        both = old & old.roll(-1, 1)
        return torch.where(last, both.roll(1, 1), both)
