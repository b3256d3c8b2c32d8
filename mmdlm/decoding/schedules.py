"""How many positions of a block are committed in each step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from mmdlm.decoding.numerics import rank
from mmdlm.decoding.view import View

SCHEDULES = ("cosine", "linear", "pow<exponent>", "exp", "log", "sigmoid")
SIGMOID = 3.0  # half the range of the sigmoid, lucidrains/muse-maskgit-pytorch
POWER = re.compile(r"pow(\d+(?:\.\d+)?|\.\d+)")
Counts = Callable[[int, int], list[int]]
"""From the masks of a block and its number of steps to the positions committed in each step."""


def scheduled(view: View, steps: int | None) -> Tensor:
    """[B R] bool, the most confident positions in equal shares per step, see `TopK`.

    Args:
        view: the rows.
        steps: steps for the whole answer; None: one position per step.
    """
    if steps is None:
        best = view.confidence.argmax(1, keepdim=True)  # of equals the first
        return torch.zeros_like(view.open).scatter_(1, best, True)
    each, now, masks = view.share(steps), view.block_step, view.block_masks
    quota = masks // each + (now < masks % each)
    quota = torch.where(now >= each - 1, view.length, quota).to(view.device)
    return view.open & (rank(view.confidence) < quota[:, None])


def due(view: View, steps: Tensor, counts: Counts) -> Tensor:
    """[B] int64, positions that each row commits in this step.

    From the last step that commits something on, all that is left commits, so that nothing remains
    when other strategies commit positions too.

    Args:
        view: the rows.
        steps: [B] host int64, steps of each row's block.
        counts: the schedule; called in every step, so it should be cached.
    """
    found = []
    for masks, all_steps, now in _clocks(view, steps):
        table = counts(masks, all_steps)
        found.append(table[now] if now < _last(table) else view.length)
    return torch.tensor(found, device=view.device)


def lasts(view: View, steps: Tensor, counts: Counts) -> bool:
    """Whether `due` leaves a mask in the block of every row after this step."""
    for masks, all_steps, now in _clocks(view, steps):
        table = counts(masks, all_steps)
        if now >= _last(table) or sum(table[: now + 1]) >= masks:
            return False
    return True


def _clocks(view: View, steps: Tensor) -> list[tuple[int, int, int]]:
    """Masks and steps of each row's block, and the steps done in it."""
    clocks = (view.block_masks.tolist(), steps.tolist(), view.block_step.tolist())
    return list(zip(*clocks, strict=True))


def _last(table: list[int]) -> int:
    """The last step that commits something; 0 if none does."""
    return max((i for i, count in enumerate(table) if count), default=0)


@lru_cache(maxsize=4096)
def quotas(masks: int, steps: int, mode: str) -> list[int]:
    """Tokens to commit in each step; their sum is the number of masks.

    Args:
        masks: number of masks at first.
        steps: number of steps, at least 1.
        mode: see `MaskGIT.schedule`.
    Raises:
        ValueError: the mode is unknown.
    """
    kept = [masks, *remaining(masks, steps, mode)]
    return [before - after for before, after in zip(kept, kept[1:], strict=False)]


def remaining(masks: int, steps: int, mode: str) -> list[int]:
    """How many of some masks remain after each step.

    The reference's curve goes through numpy, so the product is rounded down in float64, in which
    24 (1 - 5 / 12) is a little less than 14.

    Args:
        masks: number of masks at first.
        steps: number of steps, at least 1.
        mode: see `MaskGIT.schedule`.
    Raises:
        ValueError: the mode is unknown.
    """
    return [int(masks * share(i / steps, masks, mode)) for i in range(1, steps + 1)]


@lru_cache(maxsize=4096)
def kept(masks: int, steps: int, mode: str) -> list[int]:
    """How many of some masks remain after each step, rounded in float32 as image generators do.

    64 cos(pi / 3), which is 32, becomes 31.

    Args:
        masks: number of masks at first.
        steps: number of steps, at least 1.
        mode: see `MaskGIT.schedule`.
    Raises:
        ValueError: the mode is unknown.
    """
    ratio = torch.tensor([i / steps for i in range(1, steps + 1)])
    if mode == "cosine":
        shares = torch.cos(math.pi / 2 * ratio)
    elif mode == "linear":
        shares = 1 - ratio
    else:
        shares = torch.tensor([share(i / steps, masks, mode) for i in range(1, steps + 1)])
    return (masks * shares).floor().long().tolist()


def share(ratio: float, masks: int, mode: str) -> float:
    """Share of a block that is masked when `ratio` of its steps are done.

    Raises:
        ValueError: the mode is unknown.
    """
    power = POWER.fullmatch(mode)
    if power:
        share = 1 - ratio ** float(power[1])
    elif mode == "linear":
        share = 1 - ratio
    elif mode == "cosine":
        share = math.cos(math.pi / 2 * ratio)
    elif mode == "exp":
        share = 1 - max(masks, 1) ** (ratio - 1)
    elif mode == "sigmoid":
        low, high = (1 / (1 + math.exp(-x)) for x in (-SIGMOID, SIGMOID))
        share = (high - 1 / (1 + math.exp(SIGMOID * (1 - 2 * ratio)))) / (high - low)
    elif mode == "log":
        share = -math.log(ratio) / math.log(masks) if masks > 1 else 1 - ratio
    else:
        raise ValueError(
            f"the schedule {mode!r} is unknown; expected one of {', '.join(SCHEDULES)}"
        )
    return min(max(share, 1e-6), 1.0)
