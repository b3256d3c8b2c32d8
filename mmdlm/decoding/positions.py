"""Sets of positions: blocks of the answer, and what must be recomputed for a valid KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.view import View


def fixed_blocks(view: View, size: int | None) -> Tensor:
    """[B L] host bool, the block of each row's first mask; empty in rows without one.

    Args:
        view: the rows.
        size: positions per block, counted from the start of the answer; None: the model's own
            blocks, or all of the answer in models without.
    """
    left, spec = view.left, view.model.spec
    first = left.int().argmax(1, keepdim=True)
    busy = left.any(1, keepdim=True)
    if size is None and spec.attention == "block_causal":
        return (view.level == view.level.gather(1, first)) & busy
    size = size or spec.block_size
    if size is None or size >= view.length - view.prompt:
        return view.answer & busy
    at, block = torch.arange(view.length) - view.prompt, (first - view.prompt) // size
    return view.answer & (at >= block * size) & (at < (block + 1) * size) & busy


def full_size(view: View, size: int | None) -> Tensor:
    """[B] host int64, positions of each row's fixed block before answers were cut.

    Args:
        view: the rows, their blocks planned.
        size: see `fixed_blocks`.
    """
    spec = view.model.spec
    if size is None and spec.attention == "block_causal":
        return torch.full_like(view.asked, spec.block_size)
    whole = torch.maximum(view.lengths, view.asked)
    size = size or spec.block_size
    if size is None:
        return whole
    start = view.plan.int().argmax(1) - view.prompt
    return torch.minimum(torch.full_like(whole, size), whole - start // size * size)


def numbered(view: View, number: Tensor) -> Tensor:
    """[B L] host bool, the positions of the lowest number that holds a mask in its row.

    Args:
        view: the rows.
        number: [B L] int64 on the host, when each position is opened; negative if never.
    """
    masks = view.left & view.answer
    lowest = number.masked_fill(~masks, 2**62).amin(1, keepdim=True)
    return (number == lowest) & masks.any(1, keepdim=True)


def heads(view: View) -> Tensor:
    """[B L] host bool, positions scored by a row of a lower level (see `mmdlm.layout`)."""
    level = view.level
    before = torch.cat([torch.full_like(level[:, :1], -1), level[:, :-1]], 1)
    return (level > before) & view.model.spec.shift


def scoring(view: View) -> Tensor:
    """[B L] host bool, the positions whose logits score the open ones."""
    return view.derived("scoring", _scoring) if view.model.spec.shift else view.plan


def _scoring(view: View) -> Tensor:
    scores = view.plan.roll(-1, 1)
    scores[:, -1] = False
    return scores


def scoring_masks(view: View) -> Tensor:
    """[B L] host bool, the positions that score the open masks, or the block if all is written."""
    masks = view.plan & view.left
    masks = masks | (view.plan & ~masks.any(1, keepdim=True))
    if not view.model.spec.shift:
        return masks
    scores = masks.roll(-1, 1)
    scores[:, -1] = False
    return scores


def needed(view: View) -> Tensor:
    """[B L] host bool, what exact logits of the open positions need, as far as it is not final.

    All that can have changed, but for positions that the open ones do not see.
    """
    if view.one_level:
        return view.derived("real", lambda view: view.level >= 0)
    settled = tuple(view.settled.tolist())
    return view.derived(("needed", settled), _needed)


def _needed(view: View) -> Tensor:
    level = view.level
    changed = (level >= view.settled[:, None]) & (level >= 0) & (level <= highest(view))
    return changed | scoring(view)


def highest(view: View) -> Tensor:
    """[B 1] host int64, the highest level that the open positions of each row see."""
    return view.derived(
        "highest", lambda view: view.level.masked_fill(~scoring(view), -1).amax(1, keepdim=True)
    )


def span(view: View) -> tuple[Tensor, Tensor]:
    """[B 1] int64 each, where the open stretch of each row starts, and the position after it."""
    return view.derived("span", _span)


def _span(view: View) -> tuple[Tensor, Tensor]:
    plan = view.plan
    start = plan.int().argmax(1, keepdim=True)
    stop = plan.shape[1] - plan.flip(1).int().argmax(1, keepdim=True)
    return start, stop


def between(view: View, start: Tensor, stop: Tensor) -> Tensor:
    """[B L] host bool, the positions from start [B 1] to stop [B 1] that the open ones see."""
    at, level = torch.arange(view.length), view.level
    if view.one_level:
        return (at >= start) & (at < stop) & (level >= 0)
    return (at >= start) & (at < stop) & (level >= 0) & (level <= highest(view))


def block_pass(view: View, within: Tensor) -> Refresh:
    """All that can have changed in the step that opens a block, then less.

    In a shifted family the position before the block scores its first one. It is not recomputed
    within the block, so while the first one is masked all is, and only that one commits.

    Args:
        view: the rows.
        within: [B L] host bool, what later steps of the block recompute.
    """
    opens = (view.block_step == 0) | ~view.has_cache
    only = None
    if view.model.spec.shift:
        start = span(view)[0]
        stuck = view.left_before.gather(1, start)
        if bool(stuck.any()):  # else no device-to-host sync
            left = view.left
            masked = (left & ~view.held).gather(1, start)
            only = (torch.arange(view.length) == start) & masked
            # A position that is held does not wait for others, but must be scored.
            alone = left.gather(1, start)[:, 0] & ((view.plan & left).sum(1) == 1)
            opens = opens | masked[:, 0] | alone
    if bool(opens.all()):
        return Refresh(needed(view), only=only)
    if not bool(opens.any()):
        return Refresh(within, only=only)
    return Refresh(torch.where(opens[:, None], needed(view), within), only=only)
