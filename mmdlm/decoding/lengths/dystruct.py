"""Dystruct: dynamic blocks of similar uncertainty, in an answer that grows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.checks import AtLeast, PositiveFloat, PositiveInt
from mmdlm.decoding.delimiters import line_breaks
from mmdlm.decoding.memory import Entry, PerAnswer, PerRow
from mmdlm.decoding.numerics import ragged
from mmdlm.decoding.resizing import longest
from mmdlm.decoding.strategy import GONE, NEW, Strategy
from mmdlm.decoding.view import View
from mmdlm.model import MultimodalDLM

NEAR = 8
"""Positions on either side of a block whose known share counts as decoded context."""


@dataclass(frozen=True)
class Dystruct(Strategy):
    """Dystruct: divides new masks into dynamic blocks, fills the least uncertain first.

    The first forward over new masks gives the uncertainty (1 - probability) of each. From left to
    right, a position joins the block of n positions before it with weight n N(uncertainty; the mean
    of the block, spread), or opens a new one with weight alpha, times e^structure after a line
    break: the larger weight wins (a Chinese restaurant process). Blocks are then opened one by one,
    that of the lowest mean uncertainty - context * (known share of the 8 positions on either side)
    first. Once all are full, tokens on either side of a block boundary that were committed below
    `repair_threshold` become masks again, once. Then masks are appended, `expansion` times the mean
    probability of the last ones, until the text has ended or `growth` is reached.

    Source: Dystruct (arXiv 2605.09820). From a description of the paper (the partition by a Chinese
    restaurant process, the order by instability and decoded context, the repair of boundaries), not
    checked against its code. Densities, the length of an expansion and all numbers are ours; where
    the paper samples, we take the most probable.

    Args:
        growth: longest answer, as a multiple of the initial length.
        expansion: masks appended if all probabilities are 1.
        alpha: weight of a new block.
        spread: standard deviation of the uncertainty within a block.
        structure: what a line break adds to the log weight of a new block.
        context: weight of known neighbours in the order of blocks.
        repair_threshold: probability below which a token at a block boundary is decided again; 0:
            none is.
    """

    paper: ClassVar[str] = "Dystruct, arXiv 2605.09820"
    requires: ClassVar[frozenset[str]] = frozenset({"full_attention", "all_scored", "final_tokens"})
    sees: ClassVar = "block"

    growth: Annotated[float, AtLeast(1)] = 2.0
    expansion: PositiveInt = 32
    alpha: PositiveFloat = 1.0
    spread: PositiveFloat = 0.2
    structure: float = 2.0
    context: float = 0.5
    repair_threshold: float = 0.5

    def prepare(self, model: MultimodalDLM, columns: slice | None) -> dict[str, Any]:
        """Ids of line breaks, and those that end an answer."""
        found = {"breaks": line_breaks(model), "ends": [model.spec.eos_id, *model.spec.stop_ids]}
        return {
            name: torch.tensor(ids, dtype=torch.int64, device=model.device)
            for name, ids in found.items()
        }

    def begin(self, view: View) -> dict[str, Entry]:
        """Computes each row's maximum length.

        `part` are the positions that were masks when they were last divided into blocks, `block`
        the number of each one's block (-1 for none) and `uncertainty` what the blocks are made of.
        """
        shape, no = view.commit_step.shape, torch.zeros(len(view.tokens), dtype=torch.bool)
        return {
            "most": PerRow(longest(view, self.growth)),
            "divided": PerRow(no),
            "repairs": PerRow(no),
            "repaired": PerRow(no),
            "part": PerAnswer(torch.zeros(shape, dtype=torch.bool), fill=False),
            "block": PerAnswer(torch.full(shape, -1), fill=-1),
            "uncertainty": PerAnswer(torch.zeros(shape)),
        }

    def plan(self, view: View) -> Tensor:
        """[B L] bool, the next block of each row, or all its masks if they are not yet divided."""
        mine, masks = view.memory(self), view.left
        divided, repairs = mine["divided"], mine["repairs"]
        whole, own = ~divided | repairs, masks[:, view.prompt :]
        part = mine["part"] | (own & repairs[:, None])
        mine["part"] = torch.where(divided[:, None], part, own)
        mine["repairs"] = torch.zeros_like(divided)
        stays = (view.plan & masks).any(1) & ~whole
        plan = torch.where(stays[:, None], view.plan, masks)
        return torch.where((stays | whole)[:, None], plan, self._next(view, masks, ~stays & ~whole))

    def block_size(self, view: View) -> Tensor:
        """[B] int64, for numbers of steps: a quarter of the answer, as blocks differ in size."""
        return (view.asked // 4).clamp(min=1)

    def replan(self, view: View) -> Tensor | None:
        """[B L] bool, the first block of rows whose masks are divided in this step."""
        mine = view.memory(self)
        new = ~mine["divided"]
        if not bool(new.any()):
            return None
        masked, start = view.here(view.masked), view.prompt
        values = torch.zeros(view.masked.shape, device=view.device)
        values = view.placed(values, masked, (-view.log_odds).sigmoid()).cpu()[:, start:]
        ids = view.placed(torch.full_like(view.tokens, -1), masked, view.candidates)
        breaks = torch.isin(ids, mine["breaks"])[:, start:].tolist()
        block = mine["block"].clone()
        for i in new.nonzero()[:, 0].tolist():
            row = values[i].tolist(), breaks[i], mine["part"][i].tolist()
            block[i] = torch.tensor(self._divide(*row))
        mine["block"] = block
        mine["uncertainty"] = torch.where(new[:, None], values, mine["uncertainty"])
        mine["divided"] = torch.ones_like(new)
        return torch.where(new[:, None], self._next(view, view.plan, new), view.plan)

    def resize(self, view: View) -> Tensor | None:
        """[B N] int64: masks at uncertain boundaries, or appended; None if no row is full."""
        mine = view.memory(self)
        full = ~view.masked.any(1).cpu()
        if not bool(full.any()):
            return None
        rows = [list(range(n)) for n in view.lengths.tolist()]
        repaired = self._boundaries(view) & (full & ~mine["repaired"])[:, None]
        for row, at in repaired.nonzero().tolist():
            rows[row][at] = NEW
        mine["repairs"] = repaired.any(1)
        grows = full & ~mine["repairs"]
        mine["repaired"] = (mine["repaired"] | full) & ~grows
        mine["divided"] = mine["divided"] & ~grows
        more = self._more(view) * grows
        if not bool((mine["repairs"] | (more > 0)).any()):
            return None
        rows = [[*row, *[NEW] * n] for row, n in zip(rows, more.tolist(), strict=True)]
        return ragged(rows, GONE)

    def _more(self, view: View) -> Tensor:
        """[B] int64, masks to append to each row; 0 once its text has ended."""
        mine = view.memory(self)
        is_end = torch.isin(view.tokens, mine["ends"]) & view.sequence.mask  # padding is end tokens
        has_ended = is_end[:, view.prompt :].any(1).cpu()
        part = mine["part"].to(view.device)
        mean = (view.commit_confidence * part).sum(1) / part.sum(1).clamp(min=1)
        more = (self.expansion * mean.cpu() + 0.5).long().clamp(min=1)
        return more.minimum(mine["most"] - view.lengths).clamp(min=0) * ~has_ended

    def _divide(self, uncertainty: list[float], breaks: list[bool], masks: list[bool]) -> list[int]:
        """The block of each position of a row, -1 where it is not masked."""
        blocks, block, count, total = [], -1, 0, 0.0
        for i, (h, is_mask) in enumerate(zip(uncertainty, masks, strict=True)):
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

    def _next(self, view: View, masks: Tensor, wanted: Tensor) -> Tensor:
        """[B L] bool, the block that some rows open next; none in rows without masks.

        Args:
            view: the rows.
            masks: [B L] host bool.
            wanted: [B] host bool, rows that open a block.
        """
        mine, start = view.memory(self), view.prompt
        known, opened = (view.level >= 0) & ~masks, torch.zeros_like(masks)
        for row in (masks.any(1) & wanted).nonzero()[:, 0].tolist():
            blocks, own, costs = mine["block"][row], masks[row, start:], {}
            for block in blocks[own].unique().tolist():
                at = ((blocks == block) & own).nonzero()[:, 0]
                first, last = start + int(at[0]), start + int(at[-1])
                before = known[row, max(0, first - NEAR) : first]
                near = torch.cat([before, known[row, last + 1 :][:NEAR]])
                share = float(near.sum()) / (2 * NEAR)
                costs[block] = float(mine["uncertainty"][row, at].mean()) - self.context * share
            opened[row, start:] = own & (blocks == min(costs, key=costs.get))
        return opened

    def _boundaries(self, view: View) -> Tensor:
        """[B G] host bool, uncertain tokens on either side of where two blocks meet."""
        block = view.memory(self)["block"]
        meet = (block[:, 1:] != block[:, :-1]) & (block[:, 1:] >= 0) & (block[:, :-1] >= 0)
        sides = F.pad(meet, (0, 1)) | F.pad(meet, (1, 0))
        uncertain = view.commit_confidence < self.repair_threshold
        return sides & (uncertain & view.writable[:, view.prompt :]).cpu()
