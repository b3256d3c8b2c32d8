"""Keys and values of a whole canvas: allocated once, rewritten row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

Rows = slice | Tensor
"""Canvas rows: a slice, or int64 [B M] with one list per batch row."""


class Pass(NamedTuple):
    """What a forward brings to a layer.

    Args:
        x: [B M D] states of the rows it computes.
        positions: [B M] their rotary positions.
        mask: bool or floating [B M keys], which keys they attend to; None for all.
        rows: where they are on the canvas.
        read: the rows of x (counted within x) whose final states are wanted; None for all.
    """

    x: Tensor
    positions: Tensor
    mask: Tensor | None
    rows: Rows
    read: Rows | None


class KV:
    """Full-length key/value buffers with one operation: rewrite some rows, attend to the rest.

    Keys are stored after rotary, so a cached key is never rotated again. A cache policy is a
    choice of rows to rewrite; nothing is concatenated, cropped or copied per step.

    Args:
        layers: number of transformer layers.
        batch: B.
        heads: key/value heads; one number per layer where they differ.
        length: canvas length L.
        head_dim: width of a head; the same.
        device: where the buffers live; one per layer where the model is split over devices.
        dtype: type of the buffers.
    """

    needs_all_queries: bool = False
    """`watch` sees the queries of all computed rows in the last layer too, not of the read ones."""

    whole_batch: ClassVar[bool] = False
    """All rows of the batch take part in every forward."""

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int | Sequence[int],
        length: int,
        head_dim: int | Sequence[int],
        *,
        device: torch.device | str | Sequence[torch.device] = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        heads, widths = ([n] * layers if isinstance(n, int) else n for n in (heads, head_dim))
        shapes = [(batch, h, length, width) for h, width in zip(heads, widths, strict=True)]
        places = [device] * layers if isinstance(device, str | torch.device) else device
        # Zeros, not empty: a row that was never written may be attended under a mask, and
        # 0 x NaN would poison the sum.
        self.keys, self.values = (
            [torch.zeros(s, device=p, dtype=dtype) for s, p in zip(shapes, places, strict=True)]
            for _ in range(2)
        )
        self.length = length
        self.end = length
        """Rows [0, end) are attended; the loop lowers it while later rows are not yet valid."""

    def write(self, layer: int, keys: Tensor, values: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer after the given rows were rewritten.

        Args:
            layer: index of the layer.
            keys: [B heads M head_dim], already rotated.
            values: [B heads M head_dim].
            rows: the M canvas rows they belong to.
        Returns:
            two views [B heads end head_dim] of the buffers.
        """
        all_keys, all_values = self.keys[layer], self.values[layer]
        if isinstance(rows, slice):
            start, _, _ = rows.indices(all_keys.shape[2])
            all_keys.narrow(2, start, keys.shape[2]).copy_(keys)
            all_values.narrow(2, start, keys.shape[2]).copy_(values)
        else:
            at = rows[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            all_keys.scatter_(2, at, keys.to(all_keys.dtype))
            all_values.scatter_(2, at, values.to(all_values.dtype))
        if self.end == all_keys.shape[2]:
            return all_keys, all_values
        return all_keys.narrow(2, 0, self.end), all_values.narrow(2, 0, self.end)

    def enter(self, layer: int, now: Pass) -> Pass:
        """What a layer computes, asked before it does; a policy may add rows.

        Args:
            layer: index of the layer.
            now: what the layer before hands on.
        """
        return now

    def leave(self, now: Pass) -> Tensor:
        """The states [B R D] of the positions to read; asked with `needs_all_queries` only.

        Args:
            now: what the last layer hands on, all positions that it computed.
        """
        return take(now.x, now.read)

    def watch(self, layer: int, queries: Tensor, rows: Rows) -> None:
        """Shown what a layer asks, after its keys and values were written.

        Args:
            layer: index of the layer.
            queries: [B H M head_dim], already rotated; in the last layer, see `needs_all_queries`.
            rows: the canvas rows the layer computes.
        """

    def keep(self, rows: Tensor) -> None:
        """Shrinks the batch to some of its rows, int64 [n]."""
        self.keys = [keys[rows.to(keys.device)] for keys in self.keys]
        self.values = [values[rows.to(values.device)] for values in self.values]

    def of_rows(self, rows: Tensor) -> KV:
        """The buffers of some rows, int64 [n]: what is written goes to these buffers."""
        return RowsKV(self, rows)

    def pad(self, left: int, right: int) -> KV:
        """Buffers with positions added on both sides; a negative `right` drops the last ones."""
        length = self.length + left + right
        stay = min(self.length, length - left)
        grown = self.like(len(self.keys[0]), length)
        for mine, theirs in zip(
            (*self.keys, *self.values), (*grown.keys, *grown.values), strict=True
        ):
            theirs[:, :, left : left + stay] = mine[:, :, :stay]
        return grown

    def select(self, at: Tensor) -> KV:
        """Buffers of some positions of each row, [B N] int64."""
        chosen = self.like(len(at), at.shape[1])
        for new, old in zip(
            (*chosen.keys, *chosen.values), (*self.keys, *self.values), strict=True
        ):
            index = at.to(old.device)[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
            torch.gather(old, 2, index, out=new)
        return chosen

    def join(self, other: KV) -> KV:
        """Buffers of these rows, then of the others; the lengths are the same."""
        both = self.like(len(self.keys[0]) + len(other.keys[0]), self.length)
        for new, one, two in zip(
            (*both.keys, *both.values),
            (*self.keys, *self.values),
            (*other.keys, *other.values),
            strict=True,
        ):
            torch.cat([one, two], out=new)
        return both

    def like(self, batch: int, length: int) -> KV:
        """Empty buffers of another size."""
        heads, width = ([keys.shape[i] for keys in self.keys] for i in (1, 3))
        places = [keys.device for keys in self.keys]
        kind = self.keys[0].dtype
        return KV(len(self.keys), batch, heads, length, width, device=places, dtype=kind)


class RowsKV(KV):
    """Buffers of some rows of a batch, for a forward in which only these take part.

    Args:
        kv: the buffers of the batch, shared, not copied.
        rows: int64 [n], the rows.
    """

    def __init__(self, kv: KV, rows: Tensor) -> None:
        self.kv, self.rows = kv, rows
        self.keys, self.values, self.length, self.end = kv.keys, kv.values, kv.length, kv.end

    def write(self, layer: int, keys: Tensor, values: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `KV.write`; what is returned are copies of the rows' keys and values."""
        found = []
        for new, buffers in ((keys, self.keys[layer]), (values, self.values[layer])):
            batch = self.rows.to(buffers.device)
            own = buffers[batch, :, : self.end]
            if isinstance(rows, slice):
                own[:, :, rows] = new
                buffers[batch, :, rows] = new.to(buffers.dtype)
            else:
                at = rows[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
                own.scatter_(2, at, new.to(own.dtype))
                place = (batch[:, None], slice(None), rows)
                buffers[place] = new.transpose(1, 2).to(buffers.dtype)
            found.append(own)
        return found[0], found[1]


class PartialKV(KV):
    """Buffers of which a forward rewrites some rows only, others in every row of the batch.

    Args:
        kv: the buffers, shared, not copied.
        renew: [B L] bool, which rows take their new keys and values.
    """

    def __init__(self, kv: KV, renew: Tensor) -> None:
        self.keys, self.values, self.length, self.end = kv.keys, kv.values, kv.length, kv.end
        self.renew = renew

    def write(self, layer: int, keys: Tensor, values: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `KV.write`; a row that is not renewed is attended as it was."""
        new = take(self.renew.to(keys.device), rows)[:, None, :, None]  # [B 1 M 1]
        old_keys, old_values = self.keys[layer], self.values[layer]
        if isinstance(rows, slice):
            old_keys, old_values = old_keys[:, :, rows], old_values[:, :, rows]
        else:
            at = rows[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            old_keys, old_values = old_keys.gather(2, at), old_values.gather(2, at)
        keys, values = torch.where(new, keys, old_keys), torch.where(new, values, old_values)
        return super().write(layer, keys, values, rows)


def take(x: Tensor, rows: Rows | None) -> Tensor:
    """The chosen rows of [B L ...]: [B M ...]; all of them for None."""
    if rows is None:
        return x
    if isinstance(rows, slice):
        return x[:, rows]
    if x.ndim == 2:
        return x.gather(1, rows)
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def count(rows: Rows) -> int:
    """How many rows there are in each row of the batch."""
    return rows.shape[1] if isinstance(rows, Tensor) else rows.stop - rows.start


def indices(rows: Rows, batch: int, device: torch.device) -> Tensor:
    """[B M] int64 of rows in either form."""
    if isinstance(rows, Tensor):
        return rows
    return torch.arange(rows.start, rows.stop, device=device).repeat(batch, 1)


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The True columns of each row as indices of equal number.

    Args:
        chosen: [B L] bool; the largest number of True is a host sync.
    Returns:
        [B M] int64, ascending; a row with fewer repeats its last one. And [B M] bool, False where
        it does.
    """
    count = chosen.sum(1, keepdim=True)
    order = chosen.int().sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(max(1, int(count.max())), device=chosen.device).expand(len(chosen), -1)
    at = order.gather(1, place.minimum((count - 1).clamp(min=0)))
    return at, place < count


def joined(one: list[Tensor], other: list[Tensor], batch: int, added: int) -> list[Tensor]:
    """The tensors of each layer, those of `batch` rows and then those of `added` rows.

    Rows without any, which have not run yet, get zeros; empty if none has any.
    """
    one = one or [x.new_zeros(batch, *x.shape[1:]) for x in other]
    other = other or [x.new_zeros(added, *x.shape[1:]) for x in one]
    return [torch.cat(both) for both in zip(one, other, strict=True)]
