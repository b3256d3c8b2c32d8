"""Answers that change their length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmdlm.decoding.dispatch import Owners
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy
from mmdlm.layout import ANSWER, TOKEN


def resize(state: DecodeState, owners: Owners) -> None:
    """Gives the canvas another length where a strategy wants it."""
    for strategy in owners.get("resize", ()):
        source = strategy.resize(state)
        if source is None:
            continue
        size, before = state.length - state.prompt, state.memory
        _rebuild(state, source)
        state.memory = _of(strategy, before)
        for other in owners["begin"]:
            if other is not strategy:
                other.begin(state)
                _carry(state, other, before, size, source)


def _of(strategy: Strategy, memory: dict[Any, Any]) -> dict[Any, Any]:
    """What a strategy keeps, under itself or under itself and a name."""
    keys = (key for key in memory if strategy in (key if isinstance(key, tuple) else (key,)))
    return {key: memory[key] for key in keys}


def _carry(
    state: DecodeState, strategy: Strategy, before: dict[Any, Any], size: int, source: Tensor
) -> None:
    """Gives a strategy back what it knew of each row and of each position that is still there.

    Args:
        state: the run, with what the strategy knows at its beginning.
        strategy: its owner.
        before: the memory of before.
        size: positions the answer had.
        source: see `Strategy.resize`.
    """
    for key, was in _of(strategy, before).items():
        new = state.memory.get(key)
        if not isinstance(was, Tensor) or not isinstance(new, Tensor):
            continue
        if was.ndim == 1:
            state.memory[key] = was
        elif was.shape[1] in (size, size + state.prompt):
            start = was.shape[1] - size  # also the prompt, where it is there
            old = source.clamp(min=0).to(was.device)[(...,) + (None,) * (was.ndim - 2)]
            kept = was[:, start:].gather(1, old.expand(-1, -1, *was.shape[2:]))
            stays = (source >= 0).to(was.device)[(...,) + (None,) * (was.ndim - 2)]
            answer = torch.where(stays, kept, new[:, start:])
            state.memory[key] = torch.cat([was[:, :start], answer], 1)


def _rebuild(state: DecodeState, source: Tensor) -> None:
    """Gives the canvas another length; see `Strategy.resize`.

    Args:
        state: the run.
        source: [B N] int64 on the CPU.
    Raises:
        ValueError: the model's attention is not full, or the text is longer than its context.
    """
    spec, device = state.model.spec, state.tokens.device
    if spec.attention != "full":
        raise ValueError(
            f"the length of the answer can change in full attention only, this model has "
            f"{spec.attention}; leave out the strategy that changes it"
        )
    first = state.sequence.positions[:, state.prompt : state.prompt + 1]
    spec.fits(int((first[:, 0].cpu() + (source != state.GONE).sum(1)).max()))
    source = source.to(device)
    old, is_old = source.clamp(min=0), source >= 0

    def moved(values: Tensor, new: int, start: int = state.prompt) -> Tensor:
        values = values[:, start:].gather(1, old)
        return values.masked_fill(~is_old, new)

    def joined(values: Tensor, answer: Tensor) -> Tensor:
        return torch.cat([values[:, : state.prompt], answer], 1)

    fresh, gone = source == state.NEW, source == state.GONE
    was, order = state.sequence, torch.arange(source.shape[1], device=device)
    answer = moved(was.tokens, spec.eos_id).masked_fill(fresh, spec.mask_id)
    state.sequence = replace(
        was,
        tokens=joined(was.tokens, answer),
        role=joined(was.role, torch.full_like(source, ANSWER)),
        source=joined(was.source, torch.full_like(source, TOKEN)),
        mask=joined(was.mask, ~gone),
        positions=joined(was.positions, first + order),
        level=joined(was.level, torch.zeros_like(source)),
    )
    state.writable = joined(state.writable, moved(state.writable, 0) | fresh)
    state.commit_step = moved(state.commit_step, -1, 0)
    state.commit_confidence = moved(state.commit_confidence, 0, 0)
    state.forget()
    state.set_levels(state.sequence.level)
    pending = state.pending[:, state.prompt :].gather(1, old.cpu()) & is_old.cpu()
    state.pending = torch.cat([state.pending[:, : state.prompt], pending], 1)
    state.wrote()


def longest(state: DecodeState, growth: float) -> Tensor:
    """[B] int64 on the CPU, positions each answer may have: so many times as at first, in reach.

    Args:
        state: the run, before its first step.
        growth: multiple of the length at first.
    """
    length, spec = state.length - state.prompt, state.model.spec
    most = torch.full((len(state.tokens),), int(growth * length))
    if spec.context is None:
        return most
    before = state.sequence.positions[:, state.prompt].cpu()
    return most.minimum((spec.reach - before).clamp(min=length))


def lengths(state: DecodeState) -> Tensor:
    """[B] int64 on the CPU, positions of each answer, which may be shorter than the canvas."""
    return (state.level[:, state.prompt :] >= 0).sum(1)


def lasting(state: DecodeState) -> list[int | None]:
    """[B] the last given position of each answer, which a cut must leave; None without any."""
    given = ~state.writable & (state.tokens != state.model.spec.eos_id)
    given = (given.cpu() & (state.level >= 0))[:, state.prompt :]
    order = torch.arange(given.shape[1])
    last = torch.where(given, order, -1).amax(1).tolist()
    return [None if at < 0 else at for at in last]
