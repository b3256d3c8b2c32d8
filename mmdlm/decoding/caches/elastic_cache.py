"""Elastic-Cache: recompute deeper layers where attention has drifted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.checks import PositiveInt
from mmdlm.backbones.kv import KV, PartialKV, Pass, Rows, indices, joined, listed
from mmdlm.backbones.transformer import finite
from mmdlm.decoding.memory import Entry, PerCanvas
from mmdlm.decoding.numerics import first
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class ElasticCache(Strategy):
    """Elastic-Cache: recomputes a window of masks; all positions where attention has drifted.

    The window is the first `window` masks of a row, wherever they are; only they may commit. After
    a first full pass, a step computes them, the tokens written in the step before, and the tracked
    tokens: in each layer, the known ones to which the masks of the window pay most attention. In
    every layer the attention of the tracked tokens is compared with what their latest queries and
    the keys of the step before make of it: the cosine over the heads, averaged over keys and
    tokens. Where it is below `gamma`, all deeper layers compute all positions, from the states
    these had when they last were computed. Approximate. Each row decides for itself: in a batch, a
    row that drifts, or that has just been added, makes the layers compute all positions of the
    others too, but those keep what they have. Costs one device-to-host sync per layer.

    In a shifted family the positions before the masks, which score them, are computed with them.
    Commit rules that share the answer over a number of steps take it as one block.

    Source: VILA-Lab/Elastic-Cache: llada/generate.py (generate_with_elastic_cache) and the
    attention of its models, both read in public copies only; what it does in shifted families was
    not. The paper compares whole rows of attention, the code goes over heads. The published commit
    rule is `Threshold(0.9)`, its end of text is `EndOfText`.

    Args:
        window: masks of a row that are computed.
        gamma: similarity below which a row is renewed; 0 or less never renews it, above 1 all is
            computed in every step, from the first layer on, which is exact.
        track: tokens tracked for each layer.
    """

    paper: ClassVar[str] = "Elastic-Cache, arXiv 2510.14973"
    # A second forward (CFG's, without the text) would need its own drift.
    requires: ClassVar[frozenset[str]] = frozenset({"any_order", "final_tokens", "one_forward"})
    denies: ClassVar[frozenset[str]] = frozenset({"all_scored"})
    sliding: ClassVar[bool] = True

    window: PositiveInt = 16
    gamma: float = 0.9
    track: PositiveInt = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isnan(self.gamma):
            raise ValueError("ElasticCache.gamma is NaN, expected a similarity, such as 0.9")

    def begin(self, view: View) -> dict[str, Entry]:
        """The masks of the latest step."""
        return {"left": PerCanvas(view.left, fill=False)}

    def plan(self, view: View) -> Tensor:
        """[B L] bool, the first masks of every row."""
        return first(view.left & view.answer, self.window)

    def block_size(self, view: View) -> Tensor:
        """[B] int64, the lengths of the answers: one block, of which a part at a time is open."""
        return view.lengths

    def cache(self, view: View) -> KV | None:
        """Buffers that also hold states and queries; None if everything is always recomputed."""
        if self.gamma > 1:
            return None
        kv = view.model.backbone.cache(len(view.tokens), view.length)
        return Elastic(kv, self.gamma, self.track)

    def refresh(self, view: View) -> Refresh:
        """All positions at first, then the window, what was written or taken back, the tracked."""
        if self.gamma > 1:
            return Refresh(view.level >= 0, cached=False)
        mine, left, real = view.memory(self), view.left, view.level >= 0
        asked = view.plan | (left ^ mine["left"])
        if view.model.spec.shift:
            asked = asked | view.plan.roll(-1, 1)
        mine["left"] = left
        return Refresh(view.caches["canvas"].prepare(view, asked & real, ~left & real))


class Elastic(KV):
    """Buffers that also hold states and queries of all positions, and notice how attention moves.

    Args:
        kv: empty buffers, which are taken over.
        gamma: see `ElasticCache`.
        track: see `ElasticCache`.
    """

    needs_all_queries = True
    whole_batch = True

    def __init__(self, kv: KV, gamma: float, track: int) -> None:
        self.keys, self.values, self.length, self.end = kv.keys, kv.values, kv.length, kv.end
        self.gamma, self.track = gamma, track
        self.seen: Tensor | None = None
        """[B L L] bool, which keys each position may attend to; None for all."""
        self.laid_out = False
        """`seen` is that of the rows as they are."""
        self.states: list[Tensor] = []
        """[B L D] what each layer was last given of each position; empty before the first pass."""
        self.queries: list[Tensor] = []
        """[B H L head_dim] the latest queries of each layer."""
        batch, device = len(kv.keys[0]), kv.keys[0].device
        self.tracked = torch.zeros(batch, kv.length, dtype=torch.bool, device=device)
        """[B L] bool, known tokens to which the windows of the latest pass attended most."""
        self.since: list[int] = []
        """[B] first layer in which a row computes all its positions in this pass."""
        self.fresh: Tensor | None = None
        """[B L] bool, positions that this pass computes in every layer; None for all."""
        self.wide = True
        """The current layer computes all positions."""
        self.before: Tensor | None = None
        """[B H T L] attention of the tracked tokens before this pass; None where none drift."""

    def prepare(self, view: View, asked: Tensor, known: Tensor) -> Tensor:
        """The positions that the coming pass computes, [B L] bool on the host.

        Args:
            view: the rows; those of which nothing is cached compute everything.
            asked: [B L] bool on the host, positions to compute besides the tracked ones.
            known: [B L] bool on the host, tokens that may be tracked.
        """
        device, new = self.tracked.device, ~view.has_cache
        tracked = self.tracked.cpu() & ~new[:, None]
        compute = asked | tracked | new[:, None]
        self.fresh = None if bool(new.all()) else compute.to(device)
        self.known, self.positions = known.to(device), view.sequence.positions
        if not self.laid_out:
            self.seen = finite(view.sequence.visible(), view.model.dtype)
            self.laid_out = True
        self.window = tuple(part.to(device) for part in listed(view.plan))
        self.probes = tuple(part.to(device) for part in listed(tracked))
        self.tracked = torch.zeros_like(self.tracked)
        self.since = [0 if added else len(self.keys) for added in new.tolist()]
        self.wide, self.before = self.fresh is None, None
        return compute

    def enter(self, layer: int, now: Pass) -> Pass:
        """See `KV.enter`: all positions from the layer on in which a row computes all of them."""
        if self.fresh is None:
            self.states[layer : layer + 1] = [now.x]
            return now
        states = self.states[layer]
        if self.wide:
            states = torch.where(self._new(layer - 1, now.x)[..., None], now.x, states)
            self.states[layer] = states
            return now._replace(x=states)
        batch, device = len(states), now.x.device
        now = now._replace(
            rows=indices(now.rows, batch, device), read=indices(now.read, batch, device)
        )
        states.scatter_(1, now.rows[..., None].expand_as(now.x), now.x)
        if min(self.since) > layer:
            return now
        self.wide = True
        seen = None if self.seen is None else self.seen[..., : self.end].to(device)
        read = now.rows.gather(1, now.read)
        return Pass(states, self.positions.to(device), seen, slice(0, self.length), read)

    def write(self, layer: int, keys: Tensor, values: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `KV.write`; rows of the batch that have not drifted keep what they have."""
        self.before = None
        if layer < max(self.since) and layer + 1 < len(self.keys):
            self.before = self._attention(layer, self.probes[0])
        if self.wide and self.fresh is not None:
            return PartialKV(self, self._new(layer, keys)).write(layer, keys, values, rows)
        return super().write(layer, keys, values, rows)

    def watch(self, layer: int, queries: Tensor, rows: Rows) -> None:
        """See `KV.watch`: chooses what to track next, and decides whether deeper layers renew."""
        if self.fresh is None:
            self.queries[layer : layer + 1] = [queries]
        elif self.wide:
            new = self._new(layer, queries)[:, None, :, None]
            self.queries[layer] = torch.where(new, queries, self.queries[layer])
        else:
            at = rows[:, None, :, None].expand_as(queries)
            self.queries[layer].scatter_(2, at, queries)
        at, real = (part.to(queries.device) for part in self.window)
        mass = (self._attention(layer, at) * real[:, None, :, None]).sum((1, 2))  # [B L]
        mass = mass.masked_fill(~self.known.to(mass.device), -1.0)
        most = mass.sort(dim=1, descending=True, stable=True).indices[:, : self.track]
        chosen = torch.zeros_like(mass, dtype=torch.bool).scatter(1, most, True)
        self.tracked |= chosen.to(self.tracked.device) & self.known
        if self.before is not None:
            self._drift(layer)

    def _drift(self, layer: int) -> None:
        """Where tracked attention is not what it was, deeper layers compute all positions."""
        at, real = (part.to(self.before.device) for part in self.probes)
        alike = F.cosine_similarity(self.before, self._attention(layer, at), dim=1)  # [B T L]
        counts = self._visible(at, alike) & real[..., None]
        alike = (alike * counts).sum((1, 2)) / counts.sum((1, 2))
        for i, moved in enumerate((alike < self.gamma).tolist()):
            if moved:
                self.since[i] = min(self.since[i], layer + 1)

    def _attention(self, layer: int, at: Tensor) -> Tensor:
        """[B H N L] float32, what the latest queries at [B N] make of the keys as they are."""
        keys, queries = self.keys[layer], self.queries[layer]
        heads, width = queries.shape[1], queries.shape[3]
        at = at.to(keys.device)
        queries = queries.gather(2, at[:, None, :, None].expand(-1, heads, -1, width))
        grouped = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # [B KV group*N hd]
        scores = grouped.float() @ keys.float().transpose(-1, -2) * width**-0.5
        scores = scores.unflatten(2, (-1, at.shape[1])).flatten(1, 2)  # [B H N L]
        return scores.masked_fill(~self._visible(at, scores)[:, None], -torch.inf).softmax(-1)

    def _visible(self, at: Tensor, like: Tensor) -> Tensor:
        """[B N L] bool, the keys that positions [B N] may attend to."""
        if self.seen is None:
            return torch.ones(*at.shape, self.length, dtype=torch.bool, device=like.device)
        seen = self.seen.to(like.device)
        return seen.gather(1, at[..., None].expand(-1, -1, seen.shape[2]))

    def _new(self, layer: int, like: Tensor) -> Tensor:
        """[B L] bool, what a layer renews: the positions asked for, all in drifted rows."""
        drifted = torch.tensor([layer >= since for since in self.since], device=like.device)
        return self.fresh.to(like.device) | drifted[:, None]

    def keep(self, rows: Tensor) -> None:
        """See `KV.keep`."""
        super().keep(rows)
        self.states = [states[rows.to(states.device)] for states in self.states]
        self.queries = [queries[rows.to(queries.device)] for queries in self.queries]
        self.tracked = self.tracked[rows.to(self.tracked.device)]
        self.seen = None if self.seen is None else self.seen[rows.to(self.seen.device)]

    def pad(self, left: int, right: int) -> KV:
        """See `KV.pad`."""
        grown = Elastic(super().pad(left, right), self.gamma, self.track)
        grown.states = [F.pad(x, (0, 0, left, right)) for x in self.states]
        grown.queries = [F.pad(x, (0, 0, left, right)) for x in self.queries]
        grown.tracked = F.pad(self.tracked, (left, right))
        return grown

    def join(self, other: KV) -> KV:
        """See `KV.join`; the others' buffers are of the same kind."""
        both = Elastic(super().join(other), self.gamma, self.track)
        sizes = len(self.tracked), len(other.tracked)
        both.states = joined(self.states, other.states, *sizes)
        both.queries = joined(self.queries, other.queries, *sizes)
        both.tracked = torch.cat([self.tracked, other.tracked])
        return both
