"""KLASS: commit confident positions whose prediction is stable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from encoders.checks import Cutoff, Limit, PositiveInt
from mmdlm.decoding.memory import Entry, PerAnswer
from mmdlm.decoding.numerics import odds_of, rank
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class KLASS(Strategy):
    """KLASS: commits positions above `tau` that were stable for `steps` steps, else the best.

    A step is stable if the KL divergence of a position's prediction from that of the step before is
    below `kl`. Predictions of the whole answer are compared, in models with their own blocks those
    of the open block; that takes memory for one distribution per position of the answer. In the
    first `steps` - 1 steps of a block, and if no position qualifies, the best one commits. The best
    one need not be among those that qualify.

    Source: shkim0116/KLASS: src/model/llada_klass.py (stable_confident_decode, `all`).

    Args:
        tau: probability that a position must exceed.
        kl: KL divergence in nats below which a prediction is stable.
        steps: consecutive stable steps that are required.
    """

    paper: ClassVar[str] = "KLASS, arXiv 2511.05664"
    sees: ClassVar[Literal["answer"]] = "answer"
    # It commits the best position itself, but only if none is stable and confident.
    may_idle: ClassVar[bool] = True

    tau: Cutoff = 0.9
    kl: Limit = 0.01
    steps: PositiveInt = 2

    def begin(self, view: View) -> dict[str, Entry]:
        """No predictions so far; -1 stable steps: there is none to compare with."""
        vocab, columns = view.model.spec.transformer.vocab, view.columns
        size = vocab if columns is None else columns.stop - columns.start
        shape = view.commit_step.shape
        return {
            "last": PerAnswer(torch.zeros(*shape, size, device=view.device)),
            "stable_steps": PerAnswer(torch.full_like(view.commit_step, -1), fill=-1),
        }

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] log-odds; keeps the predictions for the next step."""
        mine = view.memory(self)
        own_blocks = view.model.spec.attention not in ("full", "prefix")
        compared = view.opened if own_blocks else torch.ones_like(view.opened)
        row, column = view.here(compared).nonzero(as_tuple=True)
        place = view.at[row, column] - view.prompt
        now = logits[row, column].log_softmax(-1)  # [N V]
        p = now.exp()
        change = torch.where(p > 0, p * (now - mine["last"][row, place]), 0.0).sum(-1)
        before = mine["stable_steps"][row, place]
        after = torch.where(change < self.kl, before + 1, 0)
        stable_steps = mine["stable_steps"].clone()
        stable_steps[row, place] = torch.where(before < 0, 0, after)
        mine["stable_steps"] = stable_steps
        if len(row) == stable_steps.numel():  # no copy of what is large if all of it is new
            mine["last"] = now.view_as(mine["last"])
        else:
            last = mine["last"].clone()
            last[row, place] = now
            mine["last"] = last
        return view.log_odds

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        stable_steps = view.memory(self)["stable_steps"].gather(1, view.at - view.prompt)
        ready = view.open & (stable_steps >= self.steps) & (view.log_odds > odds_of(self.tau))
        ready &= (view.block_step >= self.steps - 1).to(view.device)[:, None]
        none = ~ready.any(1, keepdim=True)
        return ready | (none & (rank(view.confidence) < 1))
