"""Commit what is sure and has stayed what it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmdlm.decoding.numerics import odds_of, rank
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class KLASS(Strategy):
    """Commits what exceeds `tau` and has changed little for `steps` steps, else the best one.

    Change is the KL divergence of a position's prediction from that of the step before. It is
    followed over the whole answer, in models with blocks over the open window, and needs memory for
    a prediction of each position followed. In the first `steps` - 1 steps of a window, and where
    nothing is ready, the best one commits; it need not be among those that are ready.

    Source: shkim0116/KLASS: src/model/llada_klass.py (stable_confident_decode, `all`), made for
    batches: steps in which a row only waits for others to fill the window change nothing in it.

    Args:
        tau: probability that a position must exceed.
        kl: nats below which a change is little.
        steps: changes in a row that must be little.
    """

    paper: ClassVar[str] = "KLASS, arXiv 2511.05664"
    sees: ClassVar[Literal["open", "window", "answer"]] = "answer"
    # It commits the best one itself, but only where nothing is ready.
    may_idle: ClassVar[bool] = True

    tau: float = 0.9
    kl: float = 0.01
    steps: int = 2

    def __post_init__(self) -> None:
        if not self.tau >= 0:
            raise ValueError(f"KLASS.tau is {self.tau}, expected a probability")
        if not self.kl >= 0:
            raise ValueError(f"KLASS.kl is {self.kl}, expected nats, 0 or more")
        if self.steps < 1:
            raise ValueError(f"KLASS.steps is {self.steps}, expected at least 1")

    def begin(self, state: DecodeState) -> None:
        """Sets up the predictions of each position, none so far."""
        vocab = state.model.spec.transformer.vocab
        size = vocab if state.columns is None else state.columns.stop - state.columns.start
        shape, device = (len(state.tokens), state.length - state.prompt), state.tokens.device
        state.memory[self, "last"] = torch.zeros(*shape, size, device=device)
        state.memory[self, "calm"] = torch.full(shape, -1, device=device)

    def score(self, state: DecodeState, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] log-odds; keeps the predictions for the next step."""
        last, calm = state.memory[self, "last"], state.memory[self, "calm"]
        followed = state.within()
        if state.model.spec.attention in ("full", "prefix"):
            followed = torch.ones_like(followed)
        followed = state.here(followed) & state.open.any(1, keepdim=True)
        row, column = followed.nonzero(as_tuple=True)
        place = state.at[row, column] - state.prompt
        now = logits[row, column].log_softmax(-1)  # [N V]
        p = now.exp()
        change = torch.where(p > 0, p * (now - last[row, place]), 0.0).sum(-1)
        before = calm[row, place]
        after = torch.where(change < self.kl, before + 1, 0)
        calm[row, place] = torch.where(before < 0, 0, after)  # -1: no prediction to compare with
        last[row, place] = now
        return state.log_odds

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool."""
        calm = state.memory[self, "calm"].gather(1, state.at - state.prompt)
        ready = state.open & (calm >= self.steps) & (state.log_odds > odds_of(self.tau))
        if state.block_step < self.steps - 1:
            ready = torch.zeros_like(ready)
        none = ~ready.any(1, keepdim=True)
        return ready | (none & (rank(state.confidence) < 1))
