"""LLaDA2.1 token editing: replace written tokens by more probable ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoders.checks import Cutoff, NonNegativeInt
from mmdlm.decoding.memory import Entry, PerCanvas, PerRow
from mmdlm.decoding.numerics import odds_of
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class TokenEditing(Strategy):
    """LLaDA2.1 token editing: replaces tokens of the open block where another one exceeds `tau`.

    Edits happen in every step, together with the commits. Once a block is full, further passes only
    edit, until one changes nothing, so each block takes at least one forward more. Only for models
    trained to correct tokens. The published sampler uses it with `Dynamic(tau=0.95)`.

    With `EndOfText`, an edit may replace the token that ended the text; the end tokens filled in
    after it stay.

    Source: LLaDA2.1, as in ZHZisZZ/dllm: dllm/pipelines/llada21/sampler.py.

    Args:
        tau: probability that the new token must exceed.
        passes: maximum number of passes over a full block; 0 edits only in steps that commit.
    """

    paper: ClassVar[str] = "LLaDA2.1, arXiv 2602.08676"
    sees: ClassVar = "block"

    tau: Cutoff = 0.9
    passes: NonNegativeInt = 16

    def begin(self, view: View) -> dict[str, Entry]:
        """The positions filled since the block opened, and the passes over it once it was full."""
        done = torch.zeros(len(view.tokens), dtype=torch.int64)
        return {"filled": PerCanvas(torch.zeros_like(view.left), fill=False), "done": PerRow(done)}

    def edit(self, view: View) -> Tensor:
        """[B R] bool, positions filled since the block opened whose candidate exceeds `tau`."""
        mine, new = view.memory(self), view.block_step == 0
        filled = (mine["filled"] & ~new[:, None]) | (view.left & view.plan)
        done = mine["done"].masked_fill(new, 0)
        inside, masked = filled.to(view.device), view.masked
        is_full = ~(masked & inside).any(1)
        other = view.candidates != view.tokens.gather(1, view.at)
        edited = other & (view.log_odds > odds_of(self.tau)) & view.here(inside & ~masked)
        edited &= (~is_full | (done < self.passes).to(view.device))[:, None]
        full, changed = torch.stack([is_full, edited.any(1)]).cpu()  # one device-to-host copy
        done = (done + full).clamp(max=self.passes)
        mine["filled"], mine["done"] = filled, done.masked_fill(full & ~changed, self.passes)
        return edited

    def hold(self, view: View) -> Tensor:
        """[B L] bool, the positions filled in blocks with passes left."""
        mine = view.memory(self)
        return mine["filled"] & (mine["done"] < self.passes)[:, None]
