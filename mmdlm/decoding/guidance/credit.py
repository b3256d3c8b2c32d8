"""Tokens that stayed the best guess for some steps gain on the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.backbones.kv import take
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class Credit(Strategy):
    """Raises the logits of tokens that were a position's best guess in earlier steps.

    The best token of every open position gains probability ** gamma credit per step, all credit
    shrinks to `beta` of itself from step to step, and alpha * log(1 + credit) is added to the
    logits. So what the model keeps guessing reaches a threshold earlier. Credit is kept while its
    position is in the window, so it starts anew with each block.

    The reference keeps a number for every token and position. Here a position remembers `slots`
    tokens, and when one more turns up the one of least credit is forgotten: with the default values
    one that has not been guessed for 31 steps, whose logit differs by less than 0.004.

    Source: inclusionAI/dInfer: python/dinfer/decoding/parallel_strategy.py
    (CreditThresholdParallelDecoder).

    Args:
        alpha: weight of the credit; 0 changes nothing.
        gamma: power of the probability; less than 1 helps tokens that are not sure yet.
        beta: what is left of the credit after a step, 0 to 1.
        slots: tokens remembered per position; 12 bytes each.
    """

    paper: ClassVar[str] = "CreditDecoding, arXiv 2510.06133"

    alpha: float = 0.7
    gamma: float = 0.2
    beta: float = 0.8
    slots: int = 32

    def __post_init__(self) -> None:
        for name in ("alpha", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Credit.{name} is {getattr(self, name)}, expected 0 or more")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"Credit.beta is {self.beta}, expected a share, 0 to 1")
        if self.slots < 1:
            raise ValueError(f"Credit.slots is {self.slots}, expected at least 1")

    def begin(self, state: DecodeState) -> None:
        """Sets up a history without credit."""
        size = (len(state.tokens), state.length - state.prompt, self.slots)
        device = state.tokens.device
        state.memory[self, "tokens"] = torch.zeros(size, dtype=torch.int64, device=device)
        state.memory[self, "credit"] = torch.zeros(size, device=device)
        state.memory[self, "block"] = state.block

    def guide(self, state: DecodeState, logits: Tensor) -> Tensor:
        """[B R V] float32, changed in place."""
        if self.alpha == 0:
            return logits
        logits = state.ban_mask(logits)
        highest, best = logits.max(-1)
        gain = (highest - logits.logsumexp(-1)).exp() ** self.gamma  # [B R]
        tokens, credit = self._add(state, best, gain)
        return logits.scatter_add_(-1, tokens, self.alpha * credit.log1p())

    def _add(self, state: DecodeState, best: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their credit [B R slots] at the read positions after this step's guesses."""
        tokens, credit = (state.memory[self, name] for name in ("tokens", "credit"))
        outside = ~state.within()[:, state.prompt :, None]
        if state.memory[self, "block"] != state.block:
            # What an earlier block saw ahead before it found its end (`AdaBlock`).
            outside = torch.ones_like(outside)
        state.memory[self, "block"] = state.block
        credit = (self.beta * credit).masked_fill(outside, 0.0)
        at = state.at - state.prompt
        known = take(tokens, at) == best[..., None]
        had, is_known = take(credit, at), known.any(-1)
        slot = torch.where(is_known, known.long().argmax(-1), had.argmin(-1))
        gain = gain + torch.where(is_known, had.gather(-1, slot[..., None])[..., 0], 0.0)
        # A column to spare takes what is not open: positions may be read twice in a padded row.
        spare = credit.shape[1] * self.slots
        place = torch.where(state.open, at * self.slots + slot, spare)
        for name, old, new in (("tokens", tokens, best), ("credit", credit, gain)):
            flat = torch.nn.functional.pad(old.flatten(1), (0, 1)).scatter_(1, place, new)
            state.memory[self, name] = flat[:, :-1].view_as(old)
        return take(state.memory[self, "tokens"], at), take(state.memory[self, "credit"], at)
