"""Recompute what can have changed, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy


@dataclass(frozen=True)
class Exact(Strategy):
    """Keeps keys and values that can no longer change; the logits are those of a full recompute.

    A row's keys depend on rows of its own level and below only (`mmdlm.layout`). So rows below the
    level of the first masked position are final once computed with their tokens known: the prompt
    of a prefix model, the finished blocks of a block-causal one, the tokens written so far of an
    autoregressive one. With full attention nothing is final and every step recomputes everything.
    This is the loop's default.
    """

    exact: ClassVar[bool] = True

    def refresh(self, state: DecodeState) -> Refresh:
        """Rows from the first that may have changed to the last the window can see."""
        levels = column_levels(state)
        if levels is None:
            return Refresh(0, state.length, cached=False)
        end = scored_from(state, levels)
        start = min(renewed(state), state.window.start - state.model.spec.shift)
        return Refresh(start, end, cached=True, attend=end)


def scored_from(state: DecodeState, levels: tuple[Tensor, Tensor]) -> int:
    """End of the rows that the window's scores depend on.

    Args:
        state: the run.
        levels: see `column_levels`.
    """
    highest, lowest = levels
    start, stop, _ = state.window
    shift = state.model.spec.shift
    top = highest[start - shift : stop - shift].max()  # of the rows whose logits are read
    return int((lowest <= top).nonzero()[-1]) + 1


def column_levels(state: DecodeState) -> tuple[Tensor, Tensor] | None:
    """Highest and lowest level of each canvas column over the real tokens of all rows.

    Taken once per decode. Rows that leave the batch only make the bounds looser.

    Returns:
        two int64 [L] on the CPU, or None when all tokens are of one level.
    """
    if "levels" not in state.memory:
        level = state.level
        highest = level.amax(0)
        lowest = level.masked_fill(level < 0, int(level.max()) + 1).amin(0)
        state.memory["levels"] = None if highest.max() == lowest.min() else (highest, lowest)
    return state.memory["levels"]


def renewed(state: DecodeState) -> int:
    """First row whose kept keys may be out of date, if all rows from there on are now recomputed.

    Rows before the first unsettled one (the first that can see a mask) are final from now on: the
    coming forward computes them with all they depend on known.
    """
    levels = column_levels(state)
    if levels is None:
        return 0
    highest, lowest = levels
    floor = lowest[state.looked.any(0).nonzero()[0]]
    unsettled = int((highest >= floor).nonzero()[0])
    first = min(state.memory.get("final", 0), unsettled)
    state.memory["final"] = unsettled
    return first
