"""Answers that find their own length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.compatibility import full_attention
from mmdlm.decoding.numerics import odds_of, ragged
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.resizing import lasting, lengths, longest
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy, Window


@dataclass(frozen=True)
class DAEDAL(Strategy):
    """Lengthens the answer until the model believes in its end, and again where it is unsure.

    Each forward gives the end confidence of a row: the last `check` positions that predict the end
    token, their probabilities added up and divided by `check`, however few there are. First,
    nothing commits and `expansion` masks are appended per forward while it is below `enough`; then
    check / 2 end tokens close the canvas. From there blocks are filled, with everything above
    `high` or else the best. While the end confidence is below `expand_until`, the least sure open
    position of a step, if below `low`, becomes `expansion` masks. What no longer fits is cut off,
    unless it was given.

    The length given to `decode` is where it starts. As with `Blocks`, rows wait for each other at
    the end of the first phase and of each block; their lengths differ.

    Source: DAEDAL (arXiv 2508.00819; Li-Jinsong/DAEDAL: models/LLaDA_DAEDAL.py), which starts with
    64 and ends at 2048, that is with a `growth` of 32.

    Args:
        growth: longest answer, as a multiple of the length at first; at most the context.
        size: positions of a block.
        expansion: masks appended in the first phase, or put for one in the second.
        high: probability that must be exceeded to commit.
        low: probability below which a position is expanded.
        enough: end confidence at which the first phase ends; 0 skips it but for its forward.
        expand_until: end confidence from which no position is expanded; 0 keeps the length.
        check: predicted end tokens that count.
    """

    paper: ClassVar[str] = "DAEDAL, arXiv 2508.00819"
    excludes: ClassVar[tuple[str, ...]] = ("refresh",)  # the end is predicted from all positions
    may_idle: ClassVar[bool] = True
    sees: ClassVar = "answer"

    growth: float = 2.0
    size: int = 32
    expansion: int = 8
    high: float = 0.9
    low: float = 0.1
    enough: float = 0.5
    expand_until: float = 0.9
    check: int = 32

    def __post_init__(self) -> None:
        for name in ("growth", "size", "expansion", "check"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"DAEDAL.{name} is {getattr(self, name)}, expected at least 1")
        for name in ("high", "low", "enough", "expand_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"DAEDAL.{name} is {getattr(self, name)}, expected a probability")

    def begin(self, state: DecodeState) -> None:
        """Looks how long the rows may get.

        Raises:
            ValueError: the model's attention is not full.
        """
        full_attention(self, state)
        state.memory[self, "most"] = most = longest(state, self.growth)
        state.memory[self, "growing"] = torch.ones_like(most, dtype=torch.bool)

    def plan(self, state: DecodeState) -> Window:
        """The whole answer while it grows, then its blocks."""
        growing = state.memory[self, "growing"]
        if state.left.any() and bool(growing.any()):
            # A row that waits for others to grow draws nothing meanwhile, as it would alone.
            state.turns = (growing.long() - 1)[:, None].repeat(1, state.length)
            return Window(state.prompt, state.length, turn=0)
        return Blocks(self.size).plan(state)

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool; nothing while the answer grows."""
        if bool(state.memory[self, "growing"].any()):
            return torch.zeros_like(state.open)
        sure = state.log_odds > odds_of(self.high)
        return sure.scatter(1, state.confidence.argmax(1, keepdim=True), True)

    def resize(self, state: DecodeState) -> Tensor | None:
        """[B N] int64, masks appended or put in; None where all rows keep their length."""
        growing, most = (state.memory[self, name] for name in ("growing", "most"))
        unsure = state.open & ~state.taken & (state.log_odds < odds_of(self.low))
        doubt = state.log_odds.masked_fill(~unsure, torch.inf)
        least = state.at.gather(1, doubt.argmin(1, keepdim=True))[:, 0] - state.prompt
        found = torch.stack([self._ended(state), unsure.any(1), least.float()]).cpu()
        ended, sizes = found[0], lengths(state)
        if bool(growing.any()):
            grows = growing & (ended < self.enough) & (sizes < most)
            tail = growing & ~grows
            added = torch.where(grows, self.expansion, torch.where(tail, self.check // 2, 0))
            added = torch.minimum(added, most - sizes)
            state.memory[self, "growing"] = grows
            rows = [
                [*range(n), *[state.NEW if g else state.EOS] * more]
                for n, more, g in zip(sizes.tolist(), added.tolist(), grows.tolist(), strict=True)
            ]
            return ragged(rows, state.GONE) if bool(added.any()) else None
        expands = found[1].bool() & (ended < self.expand_until) & (sizes < most)
        if not bool(expands.any()):
            return None
        rows = [list(range(n)) for n in sizes.tolist()]
        given = lasting(state)
        for i in expands.nonzero()[:, 0].tolist():
            at, limit = int(found[2, i]), int(most[i])
            row = rows[i][:at] + [state.NEW] * self.expansion + rows[i][at + 1 :]
            if given[i] is None or given[i] not in row[limit:]:
                rows[i] = row[:limit]
        return ragged(rows, state.GONE)

    def _ended(self, state: DecodeState) -> Tensor:
        """[B] float32 end confidence, from the predictions of all positions."""
        real = state.here(state.sequence.mask)
        ends = (state.candidates == state.model.spec.eos_id) & real
        behind = ends.flip(1).cumsum(1).flip(1)  # how many from here to the end
        return (state.probability * (ends & (behind <= self.check))).sum(1) / self.check
