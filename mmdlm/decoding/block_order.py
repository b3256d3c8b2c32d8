"""Blocks of the answer, opened one after the other in every row."""

from __future__ import annotations

import torch
from torch import Tensor

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
