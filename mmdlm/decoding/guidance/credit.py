"""CreditDecoding: higher logits for tokens predicted in earlier steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoders.checks import NonNegativeFloat, PositiveInt, UnitFloat
from mmdlm.backbones.kv import take
from mmdlm.decoding.memory import Entry, PerAnswer
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Credit(Strategy):
    """CreditDecoding: raises the logits of tokens that were the best prediction in earlier steps.

    In every step all credit shrinks to `beta` of itself, the best token of every open position
    gains probability ** gamma, and alpha * log(1 + credit) is added to the logits. So a token that
    the model keeps guessing reaches a threshold earlier. Credit is kept within a block only: each
    block starts without any.

    The reference stores the credit of every token at every position. Here a position stores `slots`
    tokens, and a new one replaces that of least credit: with the default values one that has not
    been guessed for 31 steps, whose logit differs by less than 0.004.

    Source: inclusionAI/dInfer: python/dinfer/decoding/parallel_strategy.py
    (CreditThresholdParallelDecoder).

    Args:
        alpha: weight of the credit; 0 changes nothing.
        gamma: power of the probability; below 1 favours tokens of low probability.
        beta: share of the credit that remains after a step, 0 to 1.
        slots: tokens stored per position; 12 bytes each.
    """

    paper: ClassVar[str] = "CreditDecoding, arXiv 2510.06133"

    alpha: NonNegativeFloat = 0.7
    gamma: NonNegativeFloat = 0.2
    beta: UnitFloat = 0.8
    slots: PositiveInt = 32

    def begin(self, view: View) -> dict[str, Entry]:
        """A history without credit."""
        size = (*view.commit_step.shape, self.slots)
        return {
            "tokens": PerAnswer(torch.zeros(size, dtype=torch.int64, device=view.device)),
            "credit": PerAnswer(torch.zeros(size, device=view.device)),
        }

    def guide(self, view: View, logits: Tensor) -> Tensor:
        """[B R V] float32, changed in place."""
        if self.alpha == 0:
            return logits
        logits = view.ban_mask(logits)
        highest, best = logits.max(-1)
        gain = (highest - logits.logsumexp(-1)).exp() ** self.gamma  # [B R]
        tokens, credit = self._add(view, best, gain)
        return logits.scatter_add_(-1, tokens, self.alpha * credit.log1p())

    def _add(self, view: View, best: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their credit [B R slots] at the scored positions after this step's guesses."""
        mine = view.memory(self)
        tokens, credit = mine["tokens"], mine["credit"]
        # A new block also drops what an earlier one saw of it before it found its end (`AdaBlock`).
        opens = (view.block_step == 0).to(view.device)[:, None, None]
        outside = ~view.opened[:, view.prompt :, None] | opens
        credit = (self.beta * credit).masked_fill(outside, 0.0)
        at = view.at - view.prompt
        known = take(tokens, at) == best[..., None]
        had, is_known = take(credit, at), known.any(-1)
        slot = torch.where(is_known, known.long().argmax(-1), had.argmin(-1))
        gain = gain + torch.where(is_known, had.gather(-1, slot[..., None])[..., 0], 0.0)
        # A spare column takes what is not open: shorter rows repeat a scored position.
        spare = credit.shape[1] * self.slots
        place = torch.where(view.open, at * self.slots + slot, spare)
        for name, old, new in (("tokens", tokens, best), ("credit", credit, gain)):
            flat = torch.nn.functional.pad(old.flatten(1), (0, 1)).scatter_(1, place, new)
            mine[name] = flat[:, :-1].view_as(old)
        return take(mine["tokens"], at), take(mine["credit"], at)
