"""Answers that change their length."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdlm.decoding.view import View


def longest(view: View, growth: float) -> Tensor:
    """[B] int64 on the CPU, maximum length of each answer, within the context.

    Args:
        view: the rows, before its first step.
        growth: maximum length as a multiple of the initial one.
    """
    length, spec = view.length - view.prompt, view.model.spec
    most = torch.full((len(view.tokens),), int(growth * length))
    if spec.context is None:
        return most
    before = view.sequence.positions[:, view.prompt].cpu()
    return most.minimum((spec.reach - before).clamp(min=length))


def lasting(view: View) -> list[int | None]:
    """[B] the last given position of each answer, which a cut keeps; None without any."""
    given = ~view.writable & (view.tokens != view.model.spec.eos_id)
    given = (given.cpu() & (view.level >= 0))[:, view.prompt :]
    order = torch.arange(given.shape[1])
    last = torch.where(given, order, -1).amax(1).tolist()
    return [None if at < 0 else at for at in last]
