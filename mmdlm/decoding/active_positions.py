"""Which positions a step scores."""

from __future__ import annotations

from torch import Tensor

from mmdlm.decoding.dispatch import Owners
from mmdlm.decoding.state import State


def active_positions(state: State, owners: Owners) -> Tensor:
    """[B L] host bool, the positions this step scores: what hooks need of what is computed.

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
        if not state.one_level:
            # As far as the open masks see; the other positions of the block may see further.
            scoring = state.level.roll(shift, 1)
            masks = state.plan & state.left
            top = scoring.masked_fill(~masks, -1).amax(1, keepdim=True)
            wanted = wanted & state.unsettled & (scoring <= top)
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
    return read
