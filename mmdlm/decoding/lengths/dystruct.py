"""Answers that grow window by window, in blocks found by how sure the model is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.block_order import LATER, narrow
from mmdlm.decoding.compatibility import full_attention
from mmdlm.decoding.delimiters import line_breaks
from mmdlm.decoding.numerics import ragged
from mmdlm.decoding.resizing import lengths, longest
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy, Window


@dataclass(frozen=True)
class Dystruct(Strategy):
    """Divides each window into blocks, fills the steadiest best-anchored first, mends the seams.

    The first forward of a window gives the doubt (1 - probability) of every mask. From left to
    right, a position joins the block of n positions before it with weight n N(doubt; the mean of
    the block, spread), or opens a new one with weight alpha, times e^structure behind a line break:
    the likelier wins (a Chinese restaurant process). Blocks are then opened one by one, the lowest
    mean doubt - context * (known share of the 8 positions on either side) first. Once all are full,
    tokens next to a seam that were committed below `weld` become masks again, once. Then the
    window grows by `expansion` times the mean probability of what it holds, until the text has
    ended or `growth` is reached. Rows of a batch wait for each other at each of these points.

    Source: Dystruct (arXiv 2605.09820). From a description of the paper (the partition by a Chinese
    restaurant process, the order by instability and decoded context, the repair of edges), not
    checked against its code. Densities, the length of an expansion and all numbers are our own;
    where the paper draws, we take the likeliest.

    Args:
        growth: longest answer, as a multiple of the length given, which is the first window.
        expansion: masks appended where the model is sure of everything.
        alpha: weight of a new block.
        spread: standard deviation of the doubt within a block.
        structure: what a line break adds to the log weight of a new block.
        context: weight of known neighbours in the order of blocks.
        weld: probability below which a token beside a seam is decided again; 0: none is.
    """

    paper: ClassVar[str] = "Dystruct, arXiv 2605.09820"
    excludes: ClassVar[tuple[str, ...]] = ("refresh", "edit")
    sees: ClassVar = "window"

    growth: float = 2.0
    expansion: int = 32
    alpha: float = 1.0
    spread: float = 0.2
    structure: float = 2.0
    context: float = 0.5
    weld: float = 0.5

    def __post_init__(self) -> None:
        for name in ("growth", "expansion"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"Dystruct.{name} is {getattr(self, name)}, expected at least 1")
        for name in ("alpha", "spread"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Dystruct.{name} is {getattr(self, name)}, expected above 0")

    def begin(self, state: DecodeState) -> None:
        """Looks how long the rows may get.

        Raises:
            ValueError: the model's attention is not full.
        """
        full_attention(self, state)
        state.memory[self, "most"] = longest(state, self.growth)
        state.memory[self, "turn"] = -1
        state.memory[self, "phase"], state.memory[self, "welded"] = "new", False

    def plan(self, state: DecodeState) -> Window:
        """The next block of each row, or all masks of a window not yet divided."""
        masks = state.left & ~state.pending
        if not masks.any():
            # Rows that waited for others, which have left meanwhile: a step in which they go on.
            start = state.prompt if state.left.any() else state.length
            return Window(start, start + int(start < state.length))
        turn, phase = state.memory[self, "turn"], state.memory[self, "phase"]
        is_new = phase != "blocks"  # the canvas is another
        if is_new:
            state.turns = torch.full_like(state.turns, LATER)
        if is_new or not bool((masks & (state.turns == turn)).any()):
            turn = state.memory[self, "turn"] = turn + 1
            if phase == "new":
                state.memory[self, "window"] = masks.clone()
            if phase == "weld":
                state.memory[self, "phase"] = "blocks"
            opened = self._next(state, masks) if phase == "blocks" else masks
            state.turns = state.turns.masked_fill(opened, turn)
            # For numbers of steps; what a block really holds differs from row to row.
            state.turn_size = max(1, state.asked // 4)
        at = (state.turns == turn).any(0).nonzero()
        return Window(int(at[0]), int(at[-1]) + 1, turn)

    def stop(self, state: DecodeState) -> Tensor:
        """[B] bool, nothing; this is where predictions are first known, and blocks are found."""
        if state.memory[self, "phase"] == "new":
            state.memory[self, "phase"] = "blocks"
            masks = state.memory[self, "window"]
            known = torch.zeros(masks.shape, device=state.at.device)
            state.put(known, state.here(state.masked), (-state.log_odds).sigmoid())
            ids = torch.full_like(state.tokens, -1)
            state.put(ids, state.here(state.masked), state.candidates)
            state.memory[self, "doubt"] = doubt = known.cpu()
            breaks = torch.isin(ids, torch.tensor(line_breaks(state.model), device=ids.device))
            rows = zip(doubt.tolist(), breaks.tolist(), masks.tolist(), strict=True)
            state.memory[self, "blocks"] = torch.tensor([self._divide(*row) for row in rows])
            narrow(state, ~self._next(state, masks))
        return torch.zeros(len(state.tokens), dtype=torch.bool, device=state.tokens.device)

    def resize(self, state: DecodeState) -> Tensor | None:
        """[B N] int64: masks at doubtful seams, or appended; None while a row is not full."""
        is_full = ~state.masked.any(1).cpu()
        if not bool(is_full.all()):
            # Full rows stay in the batch until the others are.
            state.pending[:, state.prompt] |= is_full
            return None
        sizes = lengths(state).tolist()
        rows = [list(range(n)) for n in sizes]
        if not state.memory[self, "welded"]:
            state.memory[self, "welded"] = True
            seams = self._seams(state)
            for row, at in seams[:, state.prompt :].nonzero().tolist():
                rows[row][at] = state.NEW
            if seams.any():
                state.pending[:, state.prompt] |= ~seams.any(1)
                state.memory[self, "phase"] = "weld"
                return ragged(rows, state.GONE)
        more = self._more(state).tolist()
        state.memory[self, "phase"], state.memory[self, "welded"] = "new", False
        if not any(more):
            return None
        rows = [[*row, *[state.NEW] * n] for row, n in zip(rows, more, strict=True)]
        return ragged(rows, state.GONE)

    def _more(self, state: DecodeState) -> Tensor:
        """[B] int64, masks to append to each row; 0 once its text has ended."""
        spec = state.model.spec
        ends = torch.tensor([spec.eos_id, *spec.stop_ids], device=state.tokens.device)
        is_end = torch.isin(state.tokens, ends) & state.sequence.mask  # what is gone reads as ended
        has_ended = is_end[:, state.prompt :].any(1).cpu()
        inside = state.memory[self, "window"][:, state.prompt : state.length]
        inside = inside.to(state.tokens.device)
        sure = (state.commit_confidence * inside).sum(1) / inside.sum(1).clamp(min=1)
        more = (self.expansion * sure.cpu() + 0.5).long().clamp(min=1)
        room = state.memory[self, "most"] - lengths(state)
        return more.minimum(room).clamp(min=0) * ~has_ended

    def _divide(self, doubt: list[float], breaks: list[bool], masks: list[bool]) -> list[int]:
        """The block of each position of a row, -1 where it is not masked."""
        blocks, block, count, total = [], -1, 0, 0.0
        for i, (h, is_mask) in enumerate(zip(doubt, masks, strict=True)):
            if not is_mask:
                count = 0
            elif count:
                off = (h - total / count) / self.spread
                density = math.exp(-off * off / 2) / (self.spread * math.sqrt(2 * math.pi))
                new = self.alpha * math.exp(self.structure if breaks[i - 1] else 0)
                if new > count * density:
                    count = 0
            if is_mask:
                block, total = (block, total + h) if count else (block + 1, h)
                count += 1
            blocks.append(block if is_mask else -1)
        return blocks

    def _next(self, state: DecodeState, masks: Tensor) -> Tensor:
        """[B L] bool, the block of each row that is opened next; none in rows without masks."""
        blocks, doubt = (state.memory[self, name] for name in ("blocks", "doubt"))
        known = (state.level >= 0) & ~masks
        opened = torch.zeros_like(masks)
        for row in masks.any(1).nonzero()[:, 0].tolist():
            costs = {}
            for block in blocks[row][masks[row]].unique().tolist():
                at = ((blocks[row] == block) & masks[row]).nonzero()[:, 0]
                first, last = int(at[0]), int(at[-1])
                near = torch.cat(
                    [known[row, max(0, first - 8) : first], known[row, last + 1 :][:8]]
                )
                cost = float(doubt[row, at].mean()) - self.context * float(near.sum()) / 16
                costs[block] = cost
            opened[row] = masks[row] & (blocks[row] == min(costs, key=costs.get))
        return opened

    def _seams(self, state: DecodeState) -> Tensor:
        """[B L] bool on the CPU, doubtful tokens on either side of where two blocks meet."""
        blocks = state.memory[self, "blocks"]
        doubtful = torch.zeros_like(blocks, dtype=torch.bool)
        doubtful[:, state.prompt :] = (state.commit_confidence < self.weld).cpu()
        seams = torch.zeros_like(doubtful)
        for row, ids in enumerate(blocks.tolist()):
            for i, (a, b) in enumerate(pairwise(ids)):
                if a != b and min(a, b) >= 0:
                    seams[row, i : i + 2] = True
        return seams & doubtful & state.writable.cpu()
