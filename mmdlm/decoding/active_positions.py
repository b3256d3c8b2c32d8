"""Which positions a step scores."""

from __future__ import annotations

from torch import Tensor

from mmdlm.decoding.dispatch import Owners
from mmdlm.decoding.state import State


def active_positions(state: State, owners: Owners) -> slice | Tensor:
    """The positions this step scores: what the hooks need and the computed positions can tell.

    Returns:
        the same stretch of all rows, or [B L] bool on the host.
    Raises:
        RuntimeError: a row that has open masks scores none of them.
    """
    shift = int(state.model.spec.shift)
    scored = state.refresh.compute
    if shift:
        scored = scored.roll(shift, 1)
        scored[:, 0] = False
    left = state.left_before
    sees = {strategy.sees for strategy in owners["all"]}
    open_masks = state.plan & left
    if "answer" in sees:
        wanted = state.answer
    elif "block" in sees or not state.score_masked_only:
        wanted = state.plan
    else:
        wanted = open_masks
    read = scored & wanted
    if (only := state.refresh.only) is not None:
        only = only & state.left
        stuck = only.any(1, keepdim=True)
        # Such a row must know no more than the forward that scores its first position.
        read = (read & ~stuck) | (only & scored)
    if bool((open_masks.any(1) & ~(read & open_masks).any(1)).any()):
        name = type(owners["refresh"][0]).__name__
        raise RuntimeError(
            f"{name} computes positions that score no open mask of a row; its refresh must cover "
            "one in every row"
        )
    columns = read.any(0)
    first = int(columns.int().argmax())
    count = int(columns.sum())
    if count and bool(read[:, first : first + count].all()):
        return slice(first, first + count)
    return read
