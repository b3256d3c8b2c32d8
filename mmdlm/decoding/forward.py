"""The forwards of a step: rows that compute about the same positions run together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mmdlm.backbones.kv import KV, Rows, listed, take
from mmdlm.decoding.look import Looking
from mmdlm.layout import Sequence, chosen, seen_by

if TYPE_CHECKING:
    from mmdlm.decoding.state import State

SPREAD = 1.5
"""Rows run together while the longest computes at most this many times what the shortest does."""


@dataclass
class Part:
    """Rows of the batch that run in one forward.

    Args:
        rows: int64 [n] on the host; None for all rows.
        at: the canvas positions they compute.
        queries: [n L] host bool, the same positions.
        end: no query may attend to the keys from here on.
        mask: keys that each query may attend to, None for all; "unknown" before it is made.
    """

    rows: Tensor | None
    at: Rows
    queries: Tensor
    end: int
    mask: Tensor | Literal["unknown"] | None = "unknown"


def split(state: State, compute: Tensor, together: bool) -> list[Part]:
    """The forwards of a step.

    Args:
        state: the rows.
        compute: [B L] host bool; rows without any take no part.
        together: rows cannot be split.
    """
    if bool(compute.all()):
        return [Part(None, slice(0, state.length), compute, state.length)]
    padding = state.level < 0
    if len(compute) == 1:
        return [_part(state, None, compute, padding)]
    wide = compute | (padding & compute.any(0))
    if together or bool((wide == wide[:1]).all()):
        return [_part(state, None, wide if not together else compute, padding)]
    counts = compute.sum(1)
    order = counts.sort(descending=True, stable=True).indices
    groups: list[list[int]] = []
    for row in order.tolist():
        count = int(counts[row])
        if not count:
            continue
        if groups and count * SPREAD >= int(counts[groups[-1][0]]):
            groups[-1].append(row)
        else:
            groups.append([row])
    parts = []
    for group in groups:
        whole = len(group) == len(compute)
        rows = torch.tensor(sorted(group))
        parts.append(_part(state, None if whole else rows, compute[rows], padding[rows]))
    return parts


def _part(state: State, rows: Tensor | None, compute: Tensor, padding: Tensor) -> Part:
    """One forward of some rows, as a slice where all compute the same stretch."""
    columns = compute.any(0)
    wide = compute | (padding & columns) if len(compute) > 1 else compute
    if not state.refresh.cached:  # the keys are those of the same forward: none may be repeated
        wide = (columns.cumsum(0) > 0) & (columns.flip(0).cumsum(0).flip(0) > 0)
        wide = wide.expand_as(compute)
    first, count = int(wide[0].int().argmax()), int(wide[0].sum())
    at: Rows = slice(first, first + count)
    if not bool((wide[:, at].all()) & (wide.sum() == count * len(wide))):
        wide = compute
        at = listed(compute)[0].to(state.tokens.device)
    if state.flat:
        return Part(rows, at, wide, state.length)
    level = state.level if rows is None else state.level[rows]
    top = level.masked_fill(~wide, -1).amax(1, keepdim=True)
    seen = ((level >= 0) & (level <= top)).any(0)
    end = state.length - int(seen.flip(0).int().argmax())
    return Part(rows, at, wide, end)


def prepare(state: State) -> None:
    """Sets the forwards of a step from `state.refresh`; those of the same positions stay."""
    compute, attend = state.refresh.compute, state.refresh.attend
    how = (state.refresh.cached, any(kv.whole_batch for kv in state.caches.values()))
    before = state.noted.get("parts", (None, None, None))
    if compute is before[0] and attend is before[1] and how == before[2]:
        return
    state.parts = split(state, compute, together=how[1])
    state.noted["parts"] = (compute, attend, how)


def run(state: State, tokens: Tensor | None = None, cache: str = "canvas") -> Tensor:
    """Logits [B R V] of the scored positions; counts the forwards.

    Args:
        state: the rows, prepared.
        tokens: [B L] the canvas with other prompts (guidance); None for the canvas itself.
        cache: name of the key/value buffers; every filling needs its own.
    """
    sequence = state.sequence if tokens is None else state.sequence.with_tokens(tokens)
    if state.shown is not None:
        sequence = state.shown.after(sequence, state.prompt)
    kv = None
    if state.refresh.cached:
        if cache not in state.caches:
            state.caches[cache] = state.model.backbone.cache(len(state.tokens), state.length)
        kv = state.caches[cache]
    if state.refresh.prefill is not None:
        _prefill(state, sequence, kv)
    if state.refresh.logits is not None:
        return _stored(state, sequence, kv, state.refresh.logits)
    if len(state.parts) == 1 and state.parts[0].rows is None:
        part = state.parts[0]
        is_slice = state.read is not None and isinstance(part.at, slice)
        return _run(state, sequence, part, state.read if is_slice else state.at, kv)
    logits = None
    for part in state.parts:
        rows = part.rows.to(state.tokens.device)
        read: Rows = state.at[rows]
        if state.real is not None:  # no more than this group's longest list
            most = max(1, int(state.real[rows].sum(1).max()))
            read = read[:, :most]
        elif isinstance(part.at, slice):
            read = state.read
        some = _run(state, sequence, part, read, kv)
        if logits is None:
            logits = some.new_zeros(*state.at.shape, some.shape[-1])
        logits[rows, : some.shape[1]] = some
    return logits


def _stored(state: State, sequence: Sequence, kv: KV | None, stored: Tensor) -> Tensor:
    """Logits [B R V] of the scored positions out of the stored ones [B L V], updated first."""
    shift = int(state.model.spec.shift)
    for part in state.parts:
        rows = range(len(stored)) if part.rows is None else part.rows.tolist()
        if isinstance(part.at, slice):
            read: Rows = slice(part.at.start + shift, part.at.stop + shift)
            places = torch.arange(read.start, read.stop, device=stored.device).expand(len(rows), -1)
        else:
            read = places = part.at + shift
        some = _run(state, sequence, part, read, kv)
        for row, at, logits in zip(rows, places, some, strict=True):
            inside = at < state.length  # the last position of a shifted family scores nothing
            stored[row, at[inside]] = logits[inside]
    return take(stored, state.at)


def _prefill(state: State, sequence: Sequence, kv: KV) -> None:
    """Fills the cache of rows that ask for it."""
    shift = int(state.model.spec.shift)
    for part in split(state, state.refresh.prefill, together=False):
        rows = part.queries.any(1).nonzero()[:, 0] if part.rows is None else part.rows
        if not len(rows):
            continue
        if len(rows) < len(state.tokens) and part.rows is None:
            padding = state.level[rows] < 0
            part = _part(state, rows, state.refresh.prefill[rows], padding)
        # Something is scored, as kernels may refuse empty queries.
        if isinstance(part.at, slice):
            one: Rows = slice(part.at.start + shift, part.at.start + shift + 1)
        else:
            one = part.at[:, :1] + shift
        _run(state, sequence, part, one, kv)


def _run(state: State, sequence: Sequence, part: Part, read: Rows, kv: KV | None) -> Tensor:
    """Logits of one forward, which is counted."""
    state.calls += 1
    rows, device = part.rows, state.tokens.device
    at = torch.arange(len(state.tokens), device=device) if rows is None else rows.to(device)
    if rows is None:
        state.forwards += 1
    else:
        state.forwards[rows] += 1
        sequence = chosen(sequence, at)
        kv = None if kv is None else kv.of_rows(at)
    if state.look is not None and kv is None:  # for what layers write and see in this forward
        kv, part = state.model.backbone.cache(len(at), state.length), replace(part, mask="unknown")
    if isinstance(part.mask, str):
        part.mask = _mask(state, sequence, part, slice(0, part.end) if kv is not None else part.at)
    if kv is not None:
        kv.end = part.end
    if state.look is not None:
        kv = Looking(kv, state.look, at)
    return state.model.run(sequence, part.at, read, kv, state.columns, part.mask)


def _mask(state: State, sequence: Sequence, part: Part, keys: slice) -> Tensor | None:
    """Which of some keys may be attended to, [n M keys] bool; None for all.

    That it is all of them is found out on the host: kernels without a mask are faster, and a copy
    from the device would wait for it.
    """
    attend = state.refresh.attend
    if state.flat and attend is None:
        return None
    level = state.level if part.rows is None else state.level[part.rows]
    attend = attend if attend is None or part.rows is None else attend[part.rows]
    own = level[:, keys]
    lowest = level.masked_fill(~part.queries, 2**62).amin(1, keepdim=True)
    everything = bool((own >= 0).all()) and bool((lowest >= own).all())
    if everything and (attend is None or bool(attend[:, keys].all())):
        return None
    allowed = sequence.mask[:, keys]
    if attend is not None:
        allowed = allowed & attend[:, keys].to(allowed.device)
    return seen_by(take(sequence.level, part.at), sequence.level[:, keys], allowed)
