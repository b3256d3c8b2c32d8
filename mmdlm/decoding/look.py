"""Forwards whose layers leave positions out, as decided from the attention of the layers before."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdlm.backbones.kv import KV, Pass, Rows, count, indices, listed
from mmdlm.backbones.transformer import finite, moved


class Look:
    """What the layers of one step leave out, see `mmdlm.decoding.strategy.Strategy.look`.

    Attributes:
        leaving: [B L] host bool, positions of the prompt that leave the canvas after this step;
            None: none of them.
        needs_all_queries: see `mmdlm.backbones.kv.KV`.
    """

    leaving: Tensor | None = None
    needs_all_queries: bool = False

    def gone(self, layer: int) -> Tensor | None:
        """[B L] bool, positions that a layer neither computes nor attends to; None for none.

        Layers that leave out the same positions get the same tensor.

        Args:
            layer: index of the layer.
        """
        return None

    def watch(self, layer: int, queries: Tensor, keys: Tensor, at: Tensor, rows: Tensor) -> None:
        """Shown what a layer asks, before the next one runs.

        Args:
            layer: index of the layer.
            queries: [n H M head_dim], rotated.
            keys: [n KV end head_dim], rotated; those of positions that were not computed yet are
                zero.
            at: [n M] int64, canvas position of each query.
            rows: [n] int64, the rows of the batch.
        """


class Looking(KV):
    """The buffers of one forward in which a `Look` decides what the layers compute.

    Args:
        kv: the buffers, shared.
        look: decides.
        rows: int64 [n], the rows of the batch that take part.
    """

    def __init__(self, kv: KV, look: Look, rows: Tensor) -> None:
        self.kv, self.look, self.rows = kv, look, rows
        self.keys, self.values, self.length, self.end = kv.keys, kv.values, kv.length, kv.end
        self.needs_all_queries = kv.needs_all_queries or look.needs_all_queries
        self.base: Pass | None = None
        self.states: Tensor | None = None
        """[n M D] of all computed positions, as of the latest layer that computed each."""
        self.left_out: Tensor | None = None
        """What the current layer leaves out, see `Look.gone`."""
        self.places: Tensor | None = None
        """[n M'] which of the M positions the current layer computes; None for all."""
        self.empty: Tensor | None = None
        """[n 1 1] bool, rows of which the current layer computes nothing."""
        self.now: Pass | None = None

    def write(self, layer: int, keys: Tensor, values: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `KV.write`."""
        return self.kv.write(layer, keys, values, rows)

    def enter(self, layer: int, now: Pass) -> Pass:
        """See `KV.enter`."""
        if self.base is None:
            self.base = now
        gone = self.look.gone(layer)
        if gone is self.left_out:
            self.now = now
            return now
        states = now.x
        if self.places is not None:  # those that were left out go on from where they were
            at = self.places[..., None].expand_as(now.x)
            states = self.states.to(now.x.device)
            computed = torch.where(self.empty, states.gather(1, at), now.x)
            states = states.scatter(1, at, computed)
        self.left_out, self.states, self.places = gone, states, None
        base = Pass(*moved(tuple(self.base), now.x.device))._replace(x=states)
        self.now = base if gone is None else self._narrowed(base, gone[self.rows.to(gone.device)])
        return self.now

    def _narrowed(self, base: Pass, gone: Tensor) -> Pass:
        """A pass without some positions [n L]: neither computed nor attended to."""
        batch, device = len(base.x), base.x.device
        gone = gone.to(device)
        rows = indices(base.rows, batch, device)
        if isinstance(base.rows, slice) and base.rows == slice(None):
            rows = torch.arange(base.x.shape[1], device=device).repeat(batch, 1)
        stays = ~gone.gather(1, rows)
        seen = ~gone[:, None, : self.end]
        mask = seen.expand(-1, rows.shape[1], -1) if base.mask is None else base.mask & seen
        mask = finite(mask, base.x.dtype)
        if bool(stays.all()):
            return base._replace(mask=mask)
        self.places, self.empty = listed(stays)[0], ~stays.any(1)[:, None, None]
        read = base.read
        if read is not None:
            read = (stays.cumsum(1) - 1).gather(1, indices(read, batch, device))
        width = base.x.shape[-1]
        return Pass(
            base.x.gather(1, self.places[..., None].expand(-1, -1, width)),
            base.positions.gather(1, self.places),
            mask.gather(1, self.places[..., None].expand(-1, -1, mask.shape[2])),
            rows.gather(1, self.places),
            read,
        )

    def watch(self, layer: int, queries: Tensor, rows: Rows) -> None:
        """See `KV.watch`."""
        at = indices(rows, len(queries), queries.device)
        if queries.shape[2] != count(at):  # the last layer asks for what is read only
            at = at.gather(1, indices(self.now.read, len(queries), queries.device))
        keys = self.keys[layer][:, :, : self.end]
        if len(keys) != len(queries):  # buffers of the whole batch
            keys = keys[self.rows.to(keys.device)]
        self.look.watch(layer, queries, keys, at, self.rows)
