"""How many positions are masked after each step of a block."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from mmdlm.decoding.state import DecodeState

SCHEDULES = ("cosine", "linear", "pow<exponent>", "exp", "log")


POWER = re.compile(r"pow(\d+(?:\.\d+)?|\.\d+)")


def quotas(masks: Tensor | int, steps: int, mode: str) -> Tensor:
    """Tokens to commit in each step, [B steps] int64 on the CPU; their sum is the number of masks.

    Args:
        masks: [B] masks of each row, or one number, which gives [steps].
        steps: number of steps, at least 1.
        mode: see `MaskGIT.schedule`.
    Raises:
        ValueError: the mode is unknown.
    """
    if isinstance(masks, int):
        return quotas(torch.tensor([masks]), steps, mode)[0]
    kept = torch.tensor([left(n, steps, mode) for n in masks.tolist()]).view(-1, steps)  # [B S]
    filled = masks.cpu()[:, None] - kept
    return filled.diff(dim=1, prepend=torch.zeros_like(filled[:, :1]))


def left(masks: int, steps: int, mode: str) -> list[int]:
    """How many of some masks are left after each step.

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


def due(state: DecodeState, key: Hashable, plan: Callable[[Tensor], Tensor]) -> Tensor:
    """[B] int64, how many positions each row commits now, from a table made once per window.

    Args:
        state: the run.
        key: what the table is kept under.
        plan: the table [B S] for the masks [B] of each row, both on the CPU. From the last step in
            which a row has something to commit it commits all that is left, so that nothing
            remains when other strategies had a hand in it.
    """
    name = (key, "quotas")
    if state.block_step == 0 or name not in state.memory:
        masks = state.block_masks.cpu()
        table = plan(masks)
        step = torch.arange(table.shape[1])
        last = ((table > 0) * step).amax(1, keepdim=True)
        state.memory[name] = table.masked_fill(step >= last, state.length).to(state.tokens.device)
        rest = masks[:, None] - table.cumsum(1)
        state.memory[key, "rest"] = rest.masked_fill(step >= last, 0).amax(0).tolist()
    table = state.memory[name]
    return table[:, min(state.block_step, table.shape[1] - 1)]


def rests(state: DecodeState, key: Hashable) -> bool:
    """Whether the table of `due` surely leaves some row a mask after this step."""
    rest = state.memory.get((key, "rest"), ())
    return 0 < state.block_step < len(rest) and rest[state.block_step] > 0


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
    elif mode == "log":
        share = -math.log(ratio) / math.log(masks) if masks > 1 else 1 - ratio
    else:
        raise ValueError(
            f"the schedule {mode!r} is unknown; expected one of {', '.join(SCHEDULES)}"
        )
    return min(max(share, 1e-6), 1.0)
