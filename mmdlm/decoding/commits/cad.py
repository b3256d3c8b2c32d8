"""Commit as many as are sure, between a least and a most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmdlm.decoding.numerics import entropy, odds_of, rank
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class CAD(Strategy):
    """Commits the best `least` to `most` positions: as many as are sure enough, within these.

    While little of the answer is written, positions that want an end token (the model's `eos_id`
    or one of its `stop_ids`) wait, unless all do: then `least` of them commit.

    It decides `score` as well: what waits must not be the position that is always committed.

    Source: yihao-liang/CDLM: scripts/LLaDA_generate_dynamic.py (generate_block), "confidence-
    adaptive decoding". It lists ids of end tokens itself, and leaves open which positions commit
    where all want one; we take the best. Its limit of steps per block, after which all commits, is
    out of reach: every step commits, and the limit is the block's length.

    Args:
        tau: probability that counts as sure, with `selection="confidence"`.
        least: positions that commit in a step at least, sure or not.
        most: positions that commit in a step at most.
        selection: what ranks and counts: the probability of the token, or the entropy.
        nats: entropy that counts as sure, with `selection="entropy"`.
        eos_share: share of the answer that must be written before end tokens commit; 0: none.
    """

    paper: ClassVar[str] = "CD4LM, arXiv 2601.02236"

    tau: float = 0.95
    least: int = 1
    most: int = 4
    selection: Literal["confidence", "entropy"] = "confidence"
    nats: float = 0.3
    eos_share: float = 0.5

    def __post_init__(self) -> None:
        if not self.tau >= 0:
            raise ValueError(f"CAD.tau is {self.tau}, expected a probability")
        if self.least < 1:
            raise ValueError(f"CAD.least is {self.least}, expected at least 1 position")
        if self.most < self.least:
            raise ValueError(f"CAD.most is {self.most}, expected least ({self.least}) or more")
        if self.selection not in ("confidence", "entropy"):
            raise ValueError(
                f"CAD.selection is {self.selection!r}, expected 'confidence' or 'entropy'"
            )
        if not self.nats >= 0:
            raise ValueError(f"CAD.nats is {self.nats}, expected nats, 0 or more")
        if not 0 <= self.eos_share <= 1:
            raise ValueError(f"CAD.eos_share is {self.eos_share}, expected a share, 0 to 1")

    def score(self, state: DecodeState, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] log-odds or negative entropy, with all that waits behind all that does not."""
        value = state.log_odds if self.selection == "confidence" else -entropy(logits)
        waits = self.waits(state)
        # Places, not values, which may be infinite: what waits keeps its order behind the rest.
        place = rank(value.masked_fill(~state.open, -torch.inf)) + waits * value.shape[1]
        floor = odds_of(self.tau) if self.selection == "confidence" else -self.nats
        state.memory[self, "sure"] = (value >= floor) & state.open & ~waits
        state.memory[self, "free"] = state.open & ~waits
        return -place.float()

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool."""
        sure, free = (state.memory[self, name].sum(1) for name in ("sure", "free"))
        count = sure.clamp(self.least, self.most)
        # Where some are free, none that waits commits.
        count = torch.where(free > 0, count.minimum(free), self.least)
        return rank(state.confidence) < count[:, None]

    def waits(self, state: DecodeState) -> Tensor:
        """[B R] bool, positions that want an end token too early."""
        ends = torch.zeros_like(state.open)
        for stop_id in {state.model.spec.eos_id, *state.model.spec.stop_ids}:
            ends |= state.candidates == stop_id
        size = state.length - state.prompt
        written = size - state.masked.sum(1, keepdim=True)
        return ends & (written < self.eos_share * size)
