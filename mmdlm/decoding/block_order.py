"""Blocks that start at different positions in different rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Window

LATER = 2**62
"""Number of the turn of positions that are not yet in one; none gets that far."""


def narrow(state: DecodeState, closed: Tensor) -> None:
    """Closes part of the open turn after its logits are known, before anything is selected.

    Args:
        state: the run.
        closed: [B L] bool on the CPU, positions that a later turn will open.
    """
    turn = state.window.turn
    state.turns = state.turns.masked_fill(closed & (state.turns == turn), LATER)
    at = (state.turns == turn).any(0).nonzero()
    state.window = Window(int(at[0]), int(at[-1]) + 1, turn)
    state.open = state.open & state.here(state.within())
    state.confidence = state.confidence.masked_fill(~state.open, -torch.inf)
    state.block_masks = state.opened(*state.window[:2]).sum(1)


def next_turn(state: DecodeState) -> Window:
    """The first turn that holds a mask in any row; the columns are those it has in all rows."""
    turn = int(state.turns[state.left].min())
    at = (state.turns[:, state.prompt :] == turn).any(0).nonzero() + state.prompt
    return Window(int(at[0]), int(at[-1]) + 1, turn)


def heads(state: DecodeState) -> Tensor:
    """[B L] bool on the CPU, positions scored by a row of a lower level (see `mmdlm.layout`)."""
    level = state.level
    before = torch.cat([torch.full_like(level[:, :1], -1), level[:, :-1]], 1)
    return (level > before) & state.model.spec.shift
