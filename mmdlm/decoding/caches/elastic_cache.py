"""Renew keys and values from the layer on where attention has moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.backbones.kv import KV, Held, Pass, Rows, listed
from mmdlm.backbones.transformer import finite
from mmdlm.decoding.compatibility import any_order
from mmdlm.decoding.numerics import first
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy, Window


@dataclass(frozen=True)
class ElasticCache(Strategy):
    """Recomputes the first masks and what was just written; the rest when attention has drifted.

    The window is the first `window` masks of a row, wherever they are; only they may commit. After
    a first full pass, a step computes them, the tokens written in the step before, and the tracked
    tokens: in each layer, the known ones to which the masks of the window pay most attention. In
    every layer the attention of the tracked tokens is compared with what their latest queries and
    the keys of the step before make of it: the cosine over the heads, averaged over keys and
    tokens. Where it is below `gamma`, all deeper layers compute all rows, from the states these had
    when they last were computed. Approximate. The decision is each row's own: in a batch, a row
    that drifts makes the deeper layers compute all rows of the others too, but those keep what they
    have. It waits for the device once per layer.

    In a shifted family the rows before the masks, which score them, are computed with them. Commit
    rules that share the answer over a number of steps take it as one block.

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
    # A token kept here would not see its change; the branch without text has no drift of its own.
    excludes: ClassVar[tuple[str, ...]] = ("edit", "CFG")

    window: int = 16
    gamma: float = 0.9
    track: int = 1

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"ElasticCache.window is {self.window}, expected at least 1 mask")
        if self.gamma != self.gamma:
            raise ValueError("ElasticCache.gamma is NaN, expected a similarity, 0.9 or so")
        if self.track < 1:
            raise ValueError(f"ElasticCache.track is {self.track}, expected at least 1 token")

    def begin(self, state: DecodeState) -> None:
        """Checks the model.

        Raises:
            ValueError: the answer is made in blocks that do not see those behind them.
        """
        any_order(self, state)

    def plan(self, state: DecodeState) -> Window:
        """The first masks of every row; an empty window when nothing is masked."""
        chosen = first(state.left, self.window)
        at = chosen.any(0).nonzero()
        if not len(at):
            return Window(state.length, state.length)
        # One block, of which a row sees a part at a time: its number does not change.
        state.turns = chosen.long() - 1
        state.turn_size = state.length - state.prompt
        return Window(int(at[0]), int(at[-1]) + 1, turn=0)

    def refresh(self, state: DecodeState) -> Refresh:
        """All rows at first, then the window, what was written or taken back, and the tracked."""
        if state.block_step == 0:
            state.block_masks = state.left.sum(1).to(state.tokens.device)
        if self.gamma > 1:
            return Refresh(0, state.length, cached=False)
        if "canvas" not in state.caches:  # not in begin: another strategy's may change the levels
            state.caches["canvas"] = Elastic(state, self.gamma, self.track)
        cache, window = state.caches["canvas"], first(state.left, self.window)
        asked, real = window, state.level >= 0
        if state.model.spec.shift:
            asked = asked | window.roll(-1, 1)
        if cache.states:
            asked = asked | (state.left ^ state.memory[self])
        state.memory[self] = state.left
        rows = cache.prepare(window, asked & real, ~state.left & real)
        return Refresh(0, state.length, cached=True, rows=rows)


class Elastic(KV):
    """Buffers that also hold states and queries of all rows, and notice where attention moves.

    Args:
        state: the run.
        gamma: see `ElasticCache`.
        track: see `ElasticCache`.
    """

    whole = True

    def __init__(self, state: DecodeState, gamma: float, track: int) -> None:
        kv = state.model.backbone.cache(len(state.tokens), state.length, fixed=False)
        self.keys, self.values, self.length, self.end = kv.keys, kv.values, kv.length, kv.end
        self.gamma, self.track = gamma, track
        sequence = state.sequence
        self.positions, self.seen = (
            sequence.positions,
            finite(sequence.visible(), state.model.dtype),
        )
        self.states: list[Tensor] = []
        """[B L D] what each layer was last given of each row; empty before the first pass."""
        self.queries: list[Tensor] = []
        """[B H L head_dim] the latest queries of each layer."""
        self.tracked = torch.zeros_like(sequence.mask)
        """[B L] bool, known tokens to which the windows of the latest pass attended most."""
        self.since: list[int] = []
        """[B] first layer in which a batch row computes all its rows in this pass."""
        self.fresh: Tensor | None = None
        """[B L] bool, rows that this pass computes in every layer; None for all."""
        self.wide = True
        """The layer at hand computes all rows."""
        self.before: Tensor | None = None
        """[B H T L] attention of the tracked tokens before this pass; None where none drift."""

    def prepare(self, window: Tensor, asked: Tensor, known: Tensor) -> Tensor | None:
        """The rows that the coming pass computes, [B L] bool on the CPU; None for all.

        Args:
            window: [B L] bool on the CPU, masks whose attention counts.
            asked: [B L] bool on the CPU, rows to compute besides the tracked ones.
            known: [B L] bool on the CPU, tokens that may be tracked.
        """
        device, tracked = self.tracked.device, self.tracked.cpu()
        rows = asked | tracked if self.states else None
        self.fresh = None if rows is None else rows.to(device)
        self.known = known.to(device)
        self.window = tuple(part.to(device) for part in listed(window))
        self.probes = tuple(part.to(device) for part in listed(tracked))
        self.tracked = torch.zeros_like(self.tracked)
        self.since = [0 if rows is None else len(self.keys)] * len(known)
        self.wide, self.before = rows is None, None
        return rows

    def enter(self, layer: int, now: Pass) -> Pass:
        """See `KV.enter`: all rows from the layer on in which a row of the batch computes all."""
        if self.fresh is None:
            self.states[layer : layer + 1] = [now.x]
            return now
        states = self.states[layer]
        if self.wide:
            states = torch.where(self._new(layer - 1, now.x)[..., None], now.x, states)
            self.states[layer] = states
            return now._replace(x=states)
        states.scatter_(1, now.rows[..., None].expand_as(now.x), now.x)
        if min(self.since) > layer:
            return now
        self.wide = True
        positions, seen = self.positions.to(states.device), self.seen
        return Pass(
            states,
            positions,
            None if seen is None else seen.to(states.device),
            slice(0, self.length),
            now.rows.gather(1, now.read),
        )

    def write(self, layer: int, keys: Tensor, values: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `KV.write`; rows of the batch that have not drifted keep what they have."""
        self.before = None
        if layer < max(self.since) and layer + 1 < len(self.keys):
            self.before = self._attention(layer, self.probes[0])
        if self.wide and self.fresh is not None:
            return Held(self, self._new(layer, keys)).write(layer, keys, values, rows)
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
        """Where tracked attention is not what it was, deeper layers compute all rows."""
        at, real = (part.to(self.before.device) for part in self.probes)
        alike = F.cosine_similarity(self.before, self._attention(layer, at), dim=1)  # [B T L]
        counts = self._visible(at, alike) & real[..., None]
        alike = (alike * counts).sum((1, 2)) / counts.sum((1, 2))
        for i, moved in enumerate((alike < self.gamma).tolist()):
            if moved:
                self.since[i] = min(self.since[i], layer + 1)

    def _attention(self, layer: int, at: Tensor) -> Tensor:
        """[B H N L] float32, what the latest queries of rows [B N] make of the keys as they are."""
        keys, queries = self.keys[layer], self.queries[layer]
        heads, width = queries.shape[1], queries.shape[3]
        at = at.to(keys.device)
        queries = queries.gather(2, at[:, None, :, None].expand(-1, heads, -1, width))
        grouped = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # [B KV group*N hd]
        scores = grouped.float() @ keys.float().transpose(-1, -2) * width**-0.5
        scores = scores.unflatten(2, (-1, at.shape[1])).flatten(1, 2)  # [B H N L]
        return scores.masked_fill(~self._visible(at, scores)[:, None], -torch.inf).softmax(-1)

    def _visible(self, at: Tensor, like: Tensor) -> Tensor:
        """[B N L] bool, the keys that rows [B N] may attend to."""
        if self.seen is None:
            return torch.ones(*at.shape, self.length, dtype=torch.bool, device=like.device)
        seen = self.seen.to(like.device)
        return seen.gather(1, at[..., None].expand(-1, -1, seen.shape[2]))

    def _new(self, layer: int, like: Tensor) -> Tensor:
        """[B L] bool, what is new after a layer: the rows asked for, and all that have drifted."""
        drifted = torch.tensor([layer >= since for since in self.since], device=like.device)
        return self.fresh.to(like.device) | drifted[:, None]

    def keep(self, rows: Tensor) -> None:
        """Shrinks the batch to some of its rows, int64 [n]."""
        super().keep(rows)
        self.states = [states[rows.to(states.device)] for states in self.states]
        self.queries = [queries[rows.to(queries.device)] for queries in self.queries]
        self.positions, self.tracked = self.positions[rows], self.tracked[rows]
        self.seen = None if self.seen is None else self.seen[rows]
