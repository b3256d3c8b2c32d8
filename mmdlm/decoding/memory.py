"""State of strategies between steps; it follows rows that leave, join and change length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One thing that is remembered of every row.

    Args:
        value: [B ...], [B G ...] or [B L ...], see the classes.
        fill: what new or padded positions hold.
    """

    value: Tensor
    fill: float | int | bool = 0

    def keep(self, rows: Tensor) -> Entry:
        """Some of the rows, int64 [n] on the host."""
        return replace(self, value=self.value[rows.to(self.value.device)])

    def pad(self, left: int, right: int) -> Entry:
        """The same where the prompts are `left` and the answers `right` positions longer."""
        return self

    def select(self, at: Tensor, real: Tensor) -> Entry:
        """The same on a canvas of some of its positions, [B N] int64 where `real` [B N] is True."""
        return self

    def join(self, other: Entry) -> Entry:
        """These rows, then the others."""
        return replace(self, value=torch.cat([self.value, other.value]))

    def resize(self, source: Tensor, prompt: int) -> Entry:
        """The same after the answers changed their length, see `Strategy.resize`."""
        return self


@dataclass(frozen=True)
class PerRow(Entry):
    """[B ...], one value per row."""


@dataclass(frozen=True)
class PerAnswer(Entry):
    """[B G ...], one value per position of the answer."""

    def pad(self, left: int, right: int) -> Entry:
        """See `Entry.pad`."""
        return replace(self, value=padded(self.value, 0, right, self.fill))

    def resize(self, source: Tensor, prompt: int) -> Entry:
        """See `Entry.resize`."""
        return replace(self, value=moved(self.value, source, self.fill))


@dataclass(frozen=True)
class PerCanvas(Entry):
    """[B L ...], one value per position of prompt and answer."""

    def pad(self, left: int, right: int) -> Entry:
        """See `Entry.pad`."""
        return replace(self, value=padded(self.value, left, right, self.fill))

    def resize(self, source: Tensor, prompt: int) -> Entry:
        """See `Entry.resize`."""
        answer = moved(self.value[:, prompt:], source, self.fill)
        return replace(self, value=torch.cat([self.value[:, :prompt], answer], 1))

    def select(self, at: Tensor, real: Tensor) -> Entry:
        """See `Entry.select`."""
        return replace(self, value=selected(self.value, at, real, self.fill))


@dataclass(frozen=True)
class PerRequest:
    """One Python object per row, which strategies replace, never change: copies of a row share it.

    Args:
        value: list of B objects.
    """

    value: list

    def keep(self, rows: Tensor) -> PerRequest:
        """See `Entry.keep`."""
        return PerRequest([self.value[i] for i in rows.tolist()])

    def pad(self, left: int, right: int) -> PerRequest:
        """See `Entry.pad`."""
        return self

    def select(self, at: Tensor, real: Tensor) -> PerRequest:
        """See `Entry.select`."""
        return self

    def join(self, other: PerRequest) -> PerRequest:
        """See `Entry.join`."""
        return PerRequest([*self.value, *other.value])

    def resize(self, source: Tensor, prompt: int) -> PerRequest:
        """See `Entry.resize`."""
        return self


class Memory:
    """What one strategy remembers: read and replaced by name, like a dict of tensors.

    Args:
        entries: what `Strategy.begin` declared.
        shared: what `Strategy.prepare` made.
    """

    def __init__(self, entries: dict[str, Entry | PerRequest], shared: dict[str, object]) -> None:
        self._entries, self._shared = entries, shared

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries.get(name)
        return self._shared[name] if entry is None else entry.value

    def __setitem__(self, name: str, value: Tensor | list) -> None:
        if name not in self._entries:
            raise KeyError(f"{name!r} was not declared by begin; known: {sorted(self._entries)}")
        old = self._entries[name]
        if isinstance(old, PerRequest):
            self._entries[name] = PerRequest(list(value))
            return
        if value.shape != old.value.shape or value.dtype != old.value.dtype:
            raise ValueError(
                f"{name!r} is {value.dtype} {list(value.shape)}; begin declared {old.value.dtype} "
                f"{list(old.value.shape)}"
            )
        self._entries[name] = replace(old, value=value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def each(self, change: str, *given: object) -> Memory:
        """The memory with a method of `Entry` applied to each of its entries."""
        new = {name: getattr(e, change)(*given) for name, e in self._entries.items()}
        return Memory(new, self._shared)

    def join(self, other: Memory) -> Memory:
        """These rows, then the others."""
        new = {name: e.join(other._entries[name]) for name, e in self._entries.items()}
        return Memory(new, self._shared)


def padded(x: Tensor, left: int, right: int, fill: float) -> Tensor:
    """[B left+N+right ...] of [B N ...], filled on both sides of dimension 1."""
    if not left and not right:
        return x
    return F.pad(x, (*(0, 0) * (x.ndim - 2), left, right), value=fill)


def moved(x: Tensor, source: Tensor, fill: float) -> Tensor:
    """[B N ...] entries of [B G ...] at the sources [B N], `fill` where they are negative."""
    at = source.to(x.device)[(...,) + (None,) * (x.ndim - 2)]
    old = x.gather(1, at.clamp(min=0).expand(-1, -1, *x.shape[2:]))
    return old.masked_fill(at < 0, fill)


def selected(x: Tensor, at: Tensor, real: Tensor, fill: float) -> Tensor:
    """[B N ...] entries of [B L ...] at the positions [B N], `fill` where `real` [B N] is False."""
    wide = (...,) + (None,) * (x.ndim - 2)
    old = x.gather(1, at.to(x.device)[wide].expand(-1, -1, *x.shape[2:]))
    return old.masked_fill(~real.to(x.device)[wide], fill)
