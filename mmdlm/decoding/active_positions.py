"""Which positions a step scores."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdlm.decoding.dispatch import Owners
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Window


def reading(state: DecodeState, owners: Owners) -> tuple[Window, Tensor | None]:
    """The positions this step scores: what the hooks need and the computed rows can tell.

    Returns:
        their bounds, and [B L] bool on the CPU, those of each row where they differ.
    """
    rows, shift = state.refresh, int(state.model.spec.shift)
    start, stop, _ = state.window
    stuck = None
    if rows.fill is not None:
        fill = slice(rows.fill.start, rows.fill.stop)
        stuck = state.left[:, fill].any(1)
        if bool((stuck | ~state.left[:, start:stop].any(1)).all()):
            return rows.fill, None
    sees = {strategy.sees for group in owners.values() for strategy in group}
    if "answer" in sees:
        start, stop = state.prompt, state.length
    start, stop = max(start, rows.start + shift), min(stop, rows.stop + shift)
    only = None
    if rows.rows is not None or stuck is not None:
        fed = torch.ones_like(state.left) if rows.rows is None else rows.rows.roll(shift, 1)
        only = torch.zeros_like(fed)
        only[:, start:stop] = fed[:, start:stop]
        if stuck is not None:  # such a row must know no more than it would alone
            only[stuck] = False
            only[stuck, fill] = True
    own = None if sees == {"open"} else _own(state, "answer" in sees)
    if own is not None and not own[:, start:stop].all():
        only = own.clone() if only is None else only & own
        only[:, :start], only[:, stop:] = False, False
    if sees == {"open"} and (only is not None or state.thrifty):
        masks = state.left if only is None else state.left & only
        if state.window.turn is not None:
            masks = masks & (state.turns == state.window.turn)
        at = masks[:, start:stop].any(0).nonzero()
        if len(at):
            start, stop = start + int(at[0]), start + int(at[-1]) + 1
        if only is not None or not masks[:, start:stop].all():
            only = masks.clone()
            only[:, :start], only[:, stop:] = False, False
    left = state.looked if only is None else state.looked & only
    if not left[:, max(start, state.window.start) : min(stop, state.window.stop)].any():
        name = type(owners["refresh"][0]).__name__
        raise RuntimeError(
            f"{name} computes rows {rows.start} to {rows.stop}, which score no masked position of "
            f"the window {state.window.start} to {state.window.stop}; its refresh must cover one"
        )
    return Window(start, stop), only


def _own(state: DecodeState, beyond: bool) -> Tensor | None:
    """[B L] bool on the CPU, what each row scores for itself (beyond its turn, too); None: all.

    A batch also computes what other rows need: turns, blocks that are final and blocks to come.
    """
    start, stop, turn = state.window
    inside = None if beyond or turn is None else state.turns == turn
    if state.model.spec.attention == "full" or state.even:
        return inside
    scoring = state.level.roll(int(state.model.spec.shift), 1)
    masks = state.left if turn is None else state.left & (state.turns == turn)
    top = scoring.masked_fill(~masks, -1)[:, start:stop].amax(1, keepdim=True)
    own = state.unsettled & (scoring <= top)
    return own if inside is None else own & inside
