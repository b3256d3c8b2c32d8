"""DAEDAL: answers of adaptive length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from encoders.checks import AtLeast, PositiveInt, UnitFloat
from mmdlm.decoding.memory import Entry, PerRow
from mmdlm.decoding.numerics import odds_of, ragged
from mmdlm.decoding.positions import fixed_blocks, full_size
from mmdlm.decoding.resizing import lasting, longest
from mmdlm.decoding.strategy import EOS, GONE, NEW, Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class DAEDAL(Strategy):
    """DAEDAL: extends the answer until an end is predicted, and at positions of low confidence.

    Each forward gives the end confidence of a row: the last `check` positions that predict the end
    token, their probabilities added up and divided by `check`, however few there are. First,
    nothing commits and `expansion` masks are appended per forward while it is below `enough`; then
    check / 2 end tokens close the canvas. From there blocks are filled, with everything above
    `high` or else the best. While the end confidence is below `expand_until`, the least confident
    open position of a step, if below `low`, becomes `expansion` masks. What no longer fits is cut
    off, unless it was given.

    The length given to `decode` is where it starts.

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
    requires: ClassVar[frozenset[str]] = frozenset({"full_attention", "all_scored"})
    may_idle: ClassVar[bool] = True
    sees: ClassVar = "answer"

    growth: Annotated[float, AtLeast(1)] = 2.0
    size: PositiveInt = 32
    expansion: PositiveInt = 8
    high: UnitFloat = 0.9
    low: UnitFloat = 0.1
    enough: UnitFloat = 0.5
    expand_until: UnitFloat = 0.9
    check: PositiveInt = 32

    def begin(self, view: View) -> dict[str, Entry]:
        """Computes each row's maximum length; all rows grow at first."""
        most = longest(view, self.growth)
        return {"most": PerRow(most), "growing": PerRow(torch.ones_like(most, dtype=torch.bool))}

    def plan(self, view: View) -> Tensor:
        """[B L] bool, the whole answer of rows that grow, the block of the others."""
        growing = view.memory(self)["growing"][:, None]
        return torch.where(growing, view.answer, fixed_blocks(view, self.size))

    def block_size(self, view: View) -> Tensor:
        """[B] int64, see `Blocks`."""
        return full_size(view, self.size)

    def select(self, view: View) -> Tensor:
        """[B R] bool; nothing in rows that grow."""
        sure = view.log_odds > odds_of(self.high)
        taken = sure.scatter(1, view.confidence.argmax(1, keepdim=True), True)
        return taken & ~view.memory(self)["growing"].to(view.device)[:, None]

    def resize(self, view: View) -> Tensor | None:
        """[B N] int64, masks appended or put in; None where all rows keep their length."""
        mine = view.memory(self)
        growing, most, sizes = mine["growing"], mine["most"], view.lengths
        unsure = view.open & ~view.taken & (view.log_odds < odds_of(self.low))
        doubt = view.log_odds.masked_fill(~unsure, torch.inf)
        least = view.at.gather(1, doubt.argmin(1, keepdim=True))[:, 0] - view.prompt
        found = torch.stack([self._ended(view), unsure.any(1), least.float()]).cpu()
        ended = found[0]
        grows = growing & (ended < self.enough) & (sizes < most)
        added = torch.where(grows, self.expansion, self.check // 2) * growing
        added = torch.minimum(added, most - sizes)
        mine["growing"] = grows
        expands = ~growing & found[1].bool() & (ended < self.expand_until) & (sizes < most)
        if not bool((expands | (added > 0)).any()):
            return None
        rows = [
            [*range(size), *[NEW if grow else EOS] * more]
            for size, more, grow in zip(sizes.tolist(), added.tolist(), grows.tolist(), strict=True)
        ]
        given = lasting(view)
        for i in expands.nonzero()[:, 0].tolist():
            at, limit = int(found[2, i]), int(most[i])
            row = rows[i][:at] + [NEW] * self.expansion + rows[i][at + 1 :]
            if given[i] is None or given[i] not in row[limit:]:
                rows[i] = row[:limit]
        return ragged(rows, GONE)

    def _ended(self, view: View) -> Tensor:
        """[B] float32 end confidence, from the predictions of all positions."""
        real = view.here(view.sequence.mask)
        ends = (view.candidates == view.model.spec.eos_id) & real
        after = ends.flip(1).cumsum(1).flip(1)  # how many from here to the end
        return (view.probability * (ends & (after <= self.check))).sum(1) / self.check
