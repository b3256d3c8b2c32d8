"""Which positions have to be recomputed so that the cached keys and values are valid."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdlm.decoding.compatibility import columns
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy, Window


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


def anew(state: DecodeState, kept: int = 0) -> Refresh:
    """The recomputation of all rows that can have changed, from which a cache goes on.

    Args:
        state: the run.
        kept: first row that may be recomputed; those before keep what they have.
    """
    first = min(max(renewed(state), kept), state.window.start - int(state.model.spec.shift))
    return Refresh(first, state.length, cached=True)


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


def open_masks(state: DecodeState) -> Tensor:
    """[B L] bool on the CPU, the masks of the window (and what else keeps it open)."""
    start, stop, turn = state.window
    masks = torch.zeros_like(state.left)
    masks[:, start:stop] = state.left[:, start:stop]
    return masks if turn is None else masks & (state.turns == turn)
