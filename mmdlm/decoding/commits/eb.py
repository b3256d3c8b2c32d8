"""EB-Sampler: commit as many positions as a bound on their joint entropy allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from encoders.checks import Limit
from mmdlm.decoding.memory import Entry, PerAnswer
from mmdlm.decoding.numerics import entropy, margin, rank, within_bound
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class EntropyBound(Strategy):
    """EB-Sampler: commits the best positions whose summed entropy, less the largest, is <= `gamma`.

    The list is in the order of confidence, best first. The sum of the entropies less the largest
    one is an upper bound of the mutual information that independent commits ignore.

    Source: the rule of the EB-Sampler paper (arXiv 2505.24857). Kamichanw/d2Cache:
    src/generation/vanilla.py takes the largest entropy over the batch rows instead of the list. At
    batch 1 it thereby leaves out the entropy of the last position in the list, which is the same
    with `order="entropy"`.

    Args:
        gamma: nats, 0 or more; 0 commits one per step unless more are certain.
        order: ranking of the positions: probability of the token, entropy, or difference of the two
            highest probabilities.
    """

    paper: ClassVar[str] = "EB-Sampler, arXiv 2505.24857"

    gamma: Limit = 1e-3
    order: Literal["confidence", "entropy", "margin"] = "confidence"

    def begin(self, view: View) -> dict[str, Entry]:
        """Room for the entropies of a step."""
        return {"entropy": PerAnswer(torch.zeros_like(view.commit_confidence))}

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] as `Probability`, `Entropy` or `Margin`; keeps the entropies for `select`."""
        mine, nats = view.memory(self), entropy(logits)
        mine["entropy"] = view.placed(mine["entropy"], view.open, nats, view.prompt)
        if self.order == "margin":
            return margin(logits)
        return view.log_odds if self.order == "confidence" else -nats

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        place = rank(view.confidence)  # positions that are not open come last
        nats = view.memory(self)["entropy"].gather(1, view.at - view.prompt)
        return within_bound(nats, place, self.gamma)
