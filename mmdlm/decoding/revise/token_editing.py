"""Write over tokens that turn out to be wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.numerics import odds_of
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class TokenEditing(Strategy):
    """Replaces tokens of the open block where another one now exceeds `tau`.

    Edits go along with the commits of every step. Once a block is full, further passes edit only,
    until one changes nothing; so each block takes at least one forward more. Only for models
    trained to correct tokens. Goes with `Dynamic(tau=0.95)`.

    With `EndOfText`, an edit may replace the token that ended the text; what was filled in behind
    it stays.

    Source: LLaDA2.1, as in ZHZisZZ/dllm: dllm/pipelines/llada21/sampler.py.

    Args:
        tau: probability that the new token must exceed.
        passes: most passes over a full block; 0 edits only beside commits.
    """

    paper: ClassVar[str] = "LLaDA2.1, arXiv 2602.08676"
    excludes: ClassVar[tuple[str, ...]] = ("PrefixCache", "DualCache")
    sees: ClassVar = "window"

    tau: float = 0.9
    passes: int = 16

    def __post_init__(self) -> None:
        if not self.tau >= 0:
            raise ValueError(f"TokenEditing.tau is {self.tau}, expected a probability")
        if self.passes < 0:
            raise ValueError(f"TokenEditing.passes is {self.passes}, expected 0 or more")

    def begin(self, state: DecodeState) -> None:
        """Nothing was written since a window opened, and no row is waiting."""
        state.memory[self, "block"] = torch.zeros_like(state.left)
        state.memory[self, "done"] = torch.zeros(len(state.tokens), dtype=torch.int64)

    def edit(self, state: DecodeState) -> Tensor:
        """[B R] bool, surer tokens than those written since the window opened."""
        names = (self, "block"), (self, "done")
        block, done = (state.memory[name] for name in names)
        now = state.left & state.within().cpu()
        block = now if state.block_step == 0 else block | now  # also what a new length put in
        if state.block_step == 0:
            # A row without a mask here waits for others; alone, it would not open this window.
            done = torch.where(block.any(1), 0, self.passes)
        state.memory[names[0]] = block
        device = state.tokens.device
        inside, masked = block.to(device), state.masked
        is_full = ~(masked & inside).any(1)
        # A row that is through waits for the others as it is.
        is_going = ~is_full | (done < self.passes).to(device)
        other = state.candidates != state.tokens.gather(1, state.at)
        edited = other & (state.log_odds > odds_of(self.tau)) & state.here(inside & ~masked)
        edited &= is_going[:, None]
        full, changed = torch.stack([is_full, edited.any(1)]).cpu()  # one look at the device
        done = (done + full).clamp(max=self.passes)
        done[full & ~changed] = self.passes
        state.memory[names[1]] = done
        state.pending |= block & (done < self.passes)[:, None]
        return edited
