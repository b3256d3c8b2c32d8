"""Keep the keys and values of tokens that have been known for a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmdlm.decoding.recompute import anew
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy


@dataclass(frozen=True)
class DKVCache(Strategy):
    """Recomputes masks and the tokens of the latest step; a full pass now and then renews the rest.

    The keys and values of a token change most in the step after its commit, in which the model sees
    it for the first time. So they are kept with one step of delay: a token is computed once more as
    itself, and reused from the step after that. Approximate between full passes. The first step of
    a block is a full pass; so is the second in families without a shift, as published.

    Any commit rule will do at any batch size. The published code needs the same number of known
    tokens in every row, and so forbids thresholds; here every row has its own list of rows. A step
    costs as much as if all rows of the batch had the longest of them.

    With `prefill` the prompt is computed once for the whole answer (dKV-Cache-PD); without `decode`
    nothing but the prompt is kept (dKV-Cache-Prefill).

    In a shifted family the row before a position scores it, and what is kept is chosen with this in
    mind. A third variant of the published code, `right`, keeps every known token, and so leaves
    masks behind a known token without a score until the next full pass; it is not offered.

    Source: horseee/dKV-Cache: generation_utils/llada_dkv_cache_decode.py, and for shifted families
    generation_utils/dream_generation_utils.py and dream_generation_utils_pd.py.

    Args:
        every: steps of a block from one full pass to the next.
        prefill: the prompt is never renewed.
        decode: known tokens of the answer (and the prompt) are reused.
        variant: rows kept in a shifted family. "un": those whose next position is known, whatever
            they hold; "un_right": those that are known themselves, too.
    """

    paper: ClassVar[str] = "dKV-Cache, arXiv 2505.15781"
    excludes: ClassVar[tuple[str, ...]] = ("edit",)  # a token kept here would not see its change

    every: int = 8
    prefill: bool = False
    decode: bool = True
    variant: Literal["un", "un_right"] = "un"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"DKVCache.every is {self.every}, expected at least 1")
        if not (self.prefill or self.decode):
            raise ValueError("DKVCache keeps nothing; expected prefill=True, decode=True or both")
        if self.variant not in ("un", "un_right"):
            raise ValueError(f"DKVCache.variant is {self.variant!r}, expected 'un' or 'un_right'")

    def refresh(self, state: DecodeState) -> Refresh:
        """All rows that can have changed, or those not known when the step before began."""
        shift, known = int(state.model.spec.shift), ~state.left
        kept = state.prompt - shift if self.prefill and state.caches else 0
        before = state.memory.get(self)
        state.memory[self] = known
        full = state.block_step % self.every == 0 or state.block_step < 2 - shift
        if full or before is None or not self.decode:
            return anew(state, kept)
        old = before & known  # a token may have been taken back
        if shift:
            scored = old.roll(-1, 1)
            if self.variant == "un":
                old = scored
            else:
                old = old & scored
                old[:, -1] = old[:, -2]
        rows = ~old & (state.level >= 0)
        rows[:, :kept] = False
        return Refresh(0, state.length, cached=True, rows=rows)
