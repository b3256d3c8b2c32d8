"""Rows that leave a running batch, join it, or change their length."""

from __future__ import annotations

from copy import copy
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.decoding.events import Finished
from mmdlm.decoding.memory import moved, padded, selected
from mmdlm.decoding.state import CLOCKS, Source, State, Streams
from mmdlm.decoding.strategy import GONE, NEW
from mmdlm.layout import ANSWER, MEDIUM, TOKEN, Sequence, chosen

HOST = (*CLOCKS, "answer", "has_cache", "resized", "plan", "region", "held", "level", "left_before")
DEVICE = ("opened", "writable", "commit_step", "commit_confidence")
STEP = ("at", "real", "open", "candidates", "log_odds", "confidence", "taken")
CANVAS = ("plan", "region", "held", "left_before", "opened", "writable")
ANSWERS = (("commit_step", -1), ("commit_confidence", 0.0))


def keep(state: State, rows: Tensor) -> None:
    """Shrinks the batch to some of its rows.

    Args:
        state: changed in place.
        rows: int64 [n] on the host, ascending.
    """
    for each in state.prompts:
        _keep(each, rows)


def _keep(state: State, rows: Tensor) -> None:
    """See `keep`; without alternatives."""
    at = rows.to(state.tokens.device)
    state.noted = {}
    state.keys = [state.keys[i] for i in rows.tolist()]
    state.draws = [state.draws[i] for i in rows.tolist()]
    state._left = None if state._left is None else state._left[rows]
    for names, index in ((HOST, rows), ((*DEVICE, *STEP), at)):
        for name in names:
            value = getattr(state, name, None)
            if value is not None and len(value):
                setattr(state, name, value[index])
    state.sequence = chosen(state.sequence, at)
    for kv in state.caches.values():
        kv.keep(at)
    state.memories = {k: memory.each("keep", rows) for k, memory in state.memories.items()}


def forked(state: State, row: int, key: int, generator: Source) -> State:
    """A copy of one row with its caches and memories, which shares no tensor with the batch.

    Args:
        state: the batch.
        row: the row.
        key: name of the copy.
        generator: source of its random draws; None: it draws the same numbers as the row.
    """
    if generator is None:
        streams, number = state.draws[row]
        own = streams.copied(number)
    else:
        own = Streams.of(generator, 1, state.tokens.device)
    made = [copy(each) for each in state.prompts]
    for each in made:
        each.caches = {name: copy(kv) for name, kv in each.caches.items()}
        _keep(each, torch.tensor([row]))
        each.keys, each.draws = [key], [(own, 0)]
    new = made[0]
    new.alternatives = dict(zip(state.alternatives, made[1:], strict=True))
    new.calls = 0
    return new


def mask_again(state: State, again: Tensor) -> Tensor:
    """Makes known answer positions [B L] masks again; those that were given stay.

    Returns:
        [B L] bool, those that were known.
    """
    again = again & ~state.masked & state.writable
    state.tokens.masked_fill_(again, state.model.spec.mask_id)
    state.commit_step.masked_fill_(again[:, state.prompt :], -1)
    state.commit_confidence.masked_fill_(again[:, state.prompt :], 0.0)
    return again


def reopen(state: State, again: Tensor) -> None:
    """Makes answer positions masks again between two steps, as if they had never been written.

    Args:
        state: changed in place.
        again: [n] bool, for the n positions of the longest answer.
    Raises:
        ValueError: it is of another size.
    """
    size, prompt = int(state.lengths.max()), state.prompt
    if again.shape != (size,):
        raise ValueError(f"again is {list(again.shape)}, expected [{size}]")
    again = F.pad(again.bool(), (prompt, state.length - prompt - size))[None]
    again = mask_again(state, again.to(state.tokens.device)).cpu()
    state.wrote()
    # Masks of another block may come first, whatever the rows of a batch are at.
    state.plan = state.plan & (state.plan | ~again).all(1, keepdim=True)
    again = again[:, prompt:]
    source = torch.where(again, NEW, torch.arange(again.shape[1]))
    for each in state.prompts:
        first = each.level[:, each.prompt :].masked_fill(~again, 2**62).amin(1)
        each.final = torch.minimum(each.final, first)
        each.has_cache = each.has_cache & ~again.any(1)
        memories = each.memories.items()
        each.memories = {k: memory.each("resize", source, each.prompt) for k, memory in memories}


def finished(state: State, row: int) -> Finished:
    """The answer of a row as it stands."""
    size = int((state.level[row, state.prompt :] >= 0).sum())
    answer = slice(state.prompt, state.prompt + size)
    return Finished(
        state.keys[row],
        state.tokens[row, answer].clone(),
        state.commit_step[row, :size].clone(),
        state.commit_confidence[row, :size].clone(),
        int(state.forwards[row]),
    )


def join(state: State, new: State) -> None:
    """Adds rows to a batch: prompts are padded on the left, answers on the right.

    Args:
        state: changed in place.
        new: other rows between two steps, of their own batch.
    Raises:
        ValueError: the rows have other alternative prompts.
    """
    if state.alternatives.keys() != new.alternatives.keys():
        names = [sorted(each.alternatives) for each in (state, new)]
        raise ValueError(
            f"the batch has the alternative prompts {names[0]}, a new request has {names[1]}; all "
            "requests of a session need the same ones"
        )
    prompt = max(state.prompt, new.prompt)
    size = max(state.length - state.prompt, new.length - new.prompt)
    for each in (state, new):
        widen(each, prompt - each.prompt, size - (each.length - each.prompt))
    for name in (*HOST, *DEVICE):
        setattr(state, name, torch.cat([getattr(state, name), getattr(new, name)]))
    state.sequence = joined(state.sequence, new.sequence)
    state.keys, state.draws = [*state.keys, *new.keys], [*state.draws, *new.draws]
    state.memories = {k: m.join(new.memories[k]) for k, m in state.memories.items()}
    for name in {*state.caches, *new.caches}:
        made = [
            each.caches.get(name) or each.model.backbone.cache(len(each.tokens), each.length)
            for each in (state, new)
        ]
        state.caches[name] = made[0].join(made[1])
    for name, other in state.alternatives.items():
        join(other, new.alternatives[name])
    state.relevel()
    state.wrote()


def widen(state: State, left: int, right: int) -> None:
    """Makes all prompts and answers longer by padding, in place."""
    if not left and not right:
        return
    spec = state.model.spec
    state.prompt += left
    state.sequence = pad(state.sequence, left, right, spec.pad_id, spec.eos_id)
    state.level = padded(state.level, left, right, -1)
    for name in CANVAS:
        setattr(state, name, padded(getattr(state, name), left, right, False))
    for name, fill in ANSWERS:
        setattr(state, name, padded(getattr(state, name), 0, right, fill))
    state.memories = {k: m.each("pad", left, right) for k, m in state.memories.items()}
    for name, kv in state.caches.items():
        state.caches[name] = kv.pad(left, right)
    for other in state.alternatives.values():
        widen(other, left, right)
    state.relevel()
    state.wrote()


def pad(sequence: Sequence, left: int, right: int, pad_id: int, eos_id: int) -> Sequence:
    """The sequence with padding before its prompts and after its answers."""
    changed = {}
    for part in fields(sequence):
        value = getattr(sequence, part.name)
        if part.name == "media" or not isinstance(value, Tensor):
            continue
        value = padded(value, left, right, 0)
        if part.name == "tokens":  # what is after a shorter answer reads as ended
            value[:, :left] = pad_id
            value[:, value.shape[1] - right :] = eos_id
        changed[part.name] = value
    return replace(sequence, **changed)


def joined(one: Sequence, other: Sequence) -> Sequence:
    """Rows of two sequences of the same length, one after the other."""
    changed = {}
    for part in fields(one):
        values = [v for v in (getattr(one, part.name), getattr(other, part.name)) if v is not None]
        if part.name == "media" and values:
            values = [v.to(values[0].dtype) for v in values]
        changed[part.name] = torch.cat(values) if values else None
    return replace(one, **changed)


def drop(state: State) -> None:
    """Takes what `Look.leaving` names out of each prompt; the rest keeps its rotary positions.

    Args:
        state: changed in place.
    """
    leaving = [None if each.look is None else each.look.leaving for each in state.prompts]
    if all(gone is None for gone in leaving):
        return
    stays = [
        (each.level >= 0)[:, : each.prompt] & (True if gone is None else ~gone[:, : each.prompt])
        for each, gone in zip(state.prompts, leaving, strict=True)
    ]
    size = max(1, *(int(stay.sum(1).max()) for stay in stays))
    for each, stay in zip(state.prompts, stays, strict=True):
        _select(each, stay, size)


def _select(state: State, stays: Tensor, size: int) -> None:
    """Leaves `size` positions of each prompt: padding, then what stays [B P], in its order."""
    prompt, length, spec = state.prompt, state.length, state.model.spec
    at = stays.int().sort(dim=1, stable=True).indices[:, prompt - size :]
    real = stays.gather(1, at)
    answer = torch.arange(prompt, length).expand(len(at), -1)
    at = torch.cat([at, answer], 1)
    real = torch.cat([real, torch.ones_like(answer, dtype=torch.bool)], 1)
    was, changed = state.sequence, {}
    for part in fields(was):
        value = getattr(was, part.name)
        if part.name != "media" and value is not None:
            fill = spec.pad_id if part.name == "tokens" else 0
            changed[part.name] = selected(value, at, real, fill)
    if was.media is not None:
        held = was.is_medium
        number = (held.flatten().cumsum(0) - 1).view_as(held)
        kept = changed["source"] == MEDIUM
        changed["media"] = was.media[number.gather(1, at.to(number.device))[kept]]
    state.sequence, state.prompt = replace(was, **changed), size
    for name in CANVAS:
        setattr(state, name, selected(getattr(state, name), at, real, False))
    state.memories = {k: m.each("select", at, real) for k, m in state.memories.items()}
    state.caches = {name: kv.select(at) for name, kv in state.caches.items()}
    state.set_levels(state.sequence.level)
    state.wrote()


def resize(state: State, source: Tensor) -> None:
    """Gives the answers another length; see `Strategy.resize`.

    Args:
        state: changed in place.
        source: [B N] int64 on the host.
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
    spec.fits(int((first[:, 0].cpu() + (source != GONE).sum(1)).max()))
    lengths = state.lengths
    order = torch.arange(source.shape[1])
    same = torch.where(order < lengths[:, None], order, GONE)
    changed = (source != same).any(1) | (lengths > source.shape[1])
    state.has_cache &= ~changed
    state.resized = changed
    state.final = torch.where(changed, 0, state.final)
    prompt, size, on = state.prompt, source.shape[1] - (state.length - state.prompt), source
    source = source.to(device)

    def answer(values: Tensor, fill: float) -> Tensor:
        return moved(values[:, prompt:], source if values.device == device else on, fill)

    def whole(values: Tensor, new: Tensor) -> Tensor:
        return torch.cat([values[:, :prompt], new], 1)

    fresh, gone = source == NEW, source == GONE
    was = state.sequence
    tokens = answer(was.tokens, spec.eos_id).masked_fill(fresh, spec.mask_id)
    state.sequence = replace(
        was,
        tokens=whole(was.tokens, tokens),
        role=whole(was.role, torch.full_like(source, ANSWER)),
        source=whole(was.source, torch.full_like(source, TOKEN)),
        mask=whole(was.mask, ~gone),
        positions=whole(was.positions, first + torch.arange(source.shape[1], device=device)),
        level=whole(was.level, torch.zeros_like(source)),
    )
    state.writable = whole(state.writable, answer(state.writable, False) | fresh)
    for name, fill in ANSWERS:
        setattr(state, name, moved(getattr(state, name), source, fill))
    for name in ("plan", "region", "held", "left_before"):
        value = getattr(state, name)
        setattr(state, name, whole(value, answer(value, False)))
    state.opened = state.plan.to(device)
    state.memories = {k: m.each("resize", on, prompt) for k, m in state.memories.items()}
    for name, kv in state.caches.items():
        state.caches[name] = kv.pad(0, size)
    for other in state.alternatives.values():
        resize(other, on)
    state.set_levels(state.sequence.level)
    state.wrote()
