"""CD4LM: commit all confident positions, between a minimum and a maximum per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from encoders.checks import Cutoff, Limit, PositiveInt, UnitFloat
from mmdlm.decoding.memory import Entry, PerAnswer
from mmdlm.decoding.numerics import entropy, odds_of, rank
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class CAD(Strategy):
    """CD4LM: commits the confident positions of a step, at least `least` and at most `most`.

    While little of the answer is written, positions whose candidate is an end token are deferred.
    End tokens are the model's `eos_id` and `stop_ids`. If all open positions are deferred, the best
    `least` of them commit.

    It decides `score` as well: the position that always commits must not be a deferred one.

    Source: yihao-liang/CDLM: scripts/LLaDA_generate_dynamic.py (generate_block), "confidence-
    adaptive decoding". It has its own list of end tokens, and does not define which positions
    commit where all are deferred; we commit the best. Its maximum of steps per block, after which
    everything commits, is the block's length and never reached: every step commits something.

    Args:
        tau: probability of a confident position, with `selection="confidence"`.
        least: positions that commit in a step at least, confident or not.
        most: positions that commit in a step at most.
        selection: measure that ranks and counts: probability of the token, or entropy.
        nats: highest entropy of a confident position, with `selection="entropy"`.
        eos_share: share of the answer that must be written before end tokens commit; 0: none.
    """

    paper: ClassVar[str] = "CD4LM, arXiv 2601.02236"

    tau: Cutoff = 0.95
    least: PositiveInt = 1
    most: PositiveInt = 4
    selection: Literal["confidence", "entropy"] = "confidence"
    nats: Limit = 0.3
    eos_share: UnitFloat = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < self.least:
            raise ValueError(f"CAD.most is {self.most}, expected least ({self.least}) or more")

    def begin(self, view: View) -> dict[str, Entry]:
        """Room for what `select` needs of the logits."""
        return {"confident": PerAnswer(torch.zeros_like(view.writable[:, view.prompt :]))}

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] minus the rank by log-odds or entropy; deferred positions rank last."""
        by_odds = self.selection == "confidence"
        value = view.log_odds if by_odds else -entropy(logits)
        confident = value >= (odds_of(self.tau) if by_odds else -self.nats)
        mine = view.memory(self)
        mine["confident"] = view.placed(mine["confident"], view.open, confident, view.prompt)
        # Ranks, because values may be infinite and could not be shifted.
        place = rank(value.masked_fill(~view.open, -torch.inf))
        return -(place + self.deferred(view) * value.shape[1]).float()

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        free = view.open & ~self.deferred(view)
        confident = view.memory(self)["confident"].gather(1, view.at - view.prompt) & free
        count, available = confident.sum(1).clamp(self.least, self.most), free.sum(1)
        # A deferred position commits only if all are deferred.
        count = torch.where(available > 0, count.minimum(available), self.least)
        return rank(view.confidence) < count[:, None]

    def deferred(self, view: View) -> Tensor:
        """[B R] bool, positions whose candidate is an end token that comes too early."""
        ends = torch.zeros_like(view.open)
        for stop_id in {view.model.spec.eos_id, *view.model.spec.stop_ids}:
            ends |= view.candidates == stop_id
        needed = (self.eos_share * view.lengths.double()).float().to(view.device)
        written = view.lengths.to(view.device) - view.masked.sum(1)
        return ends & (written < needed)[:, None]
