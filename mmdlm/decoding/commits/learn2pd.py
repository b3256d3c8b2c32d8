"""Learn2PD: commit what a learned filter predicts to be final."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from encoders.checks import Cutoff, PositiveInt
from mmdlm.backbones.kv import take
from mmdlm.decoding import aux_network
from mmdlm.decoding.numerics import odds_of
from mmdlm.decoding.schedules import scheduled
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.model import MultimodalDLM

KIND = "learn2pd filter"
ABSENT = 1.0
"""Probability that stands for missing positions of a filter's block."""


class Filter(nn.Module):
    """Two linear layers: from the probabilities of a block to whether each prediction is final.

    Args:
        size: positions of a block.
        hidden: width between the layers; None: `size`, which gives 2112 weights for blocks of 32.
            The paper's network has 2 layers and about 2 thousand weights; its code
            (model/small_model.py) is not public.
    """

    def __init__(self, size: int = 32, hidden: int | None = None) -> None:
        super().__init__()
        self.size, self.hidden = size, hidden or size
        self.inner = nn.Linear(self.size, self.hidden)
        self.outer = nn.Linear(self.hidden, self.size)

    def forward(self, confidences: Tensor) -> Tensor:
        """[... size] log-odds that a prediction is final, from probabilities [... size]."""
        return self.outer(F.relu(self.inner(confidences)))


@dataclass(frozen=True)
class Learn2PD(Strategy):
    """Learn2PD: commits what a learned filter accepts as final, plus the top-k of a schedule.

    Input of the filter are the probabilities of all predictions of the open block, written
    positions included. `mmdlm.training.learn2pd` trains one for a model. A block longer than that
    of the filter is cut into parts of its size; positions that the block lacks, or the step does
    not score, have probability 1. Without a filter only the schedule is left, which is `TopK`.

    Source: ims-kdks/Learning-to-Parallel-Decoding: llada/generate.py (generate_learn2parallel).
    Its end-of-text prediction is a separate strategy, `EndCut`.

    Args:
        filter: safetensors file of a trained filter; None: there is none.
        accept: predicted probability of being final that a position must exceed.
        steps: steps of the schedule for the whole answer; None: one position per step.
    """

    paper: ClassVar[str] = "Learn2PD, arXiv 2509.25188"
    sees: ClassVar = "block"

    filter: str | Path | None = None
    accept: Cutoff = 0.9
    steps: PositiveInt | None = None

    def prepare(self, model: MultimodalDLM, columns: slice | None) -> dict[str, Any]:
        """Loads the filter.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a filter.
        """
        if self.filter is None:
            return {}
        return {"filter": aux_network.load(self.filter, KIND, Filter).to(model.device)}

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        due = scheduled(view, self.steps)
        if self.filter is None:
            return due
        network = view.memory(self)["filter"]
        place, count = places(view), blocks(view, network.size)
        final = network(gathered(view.probability, place, count, network.size)).flatten(1)
        accepted = final.gather(1, place.clamp(min=0)) > odds_of(self.accept)
        return due | accepted


def places(view: View) -> Tensor:
    """[B R] int64 index of each scored position among the open positions of its row.

    -1 where a scored position is not open, or is repeated.
    """
    number = take(view.opened.long().cumsum(1) - 1, view.at)
    return number.masked_fill(~view.here(view.opened), -1)


def blocks(view: View, size: int) -> int:
    """Number of blocks of a size that hold the open positions of every row."""
    return -(-int(view.plan.sum(1).max()) // size)


def gathered(
    values: Tensor, place: Tensor, count: int, size: int, absent: float = ABSENT
) -> Tensor:
    """[B count size] values [B R] at the indices `place` [B R], `absent` where there is none.

    Args:
        values: [B R].
        place: [B R] int64, below count * size; values of negative ones are left out.
        count: number of blocks.
        size: positions of a block.
        absent: what the other positions hold.
    """
    spare = count * size  # a column for values without an index
    laid = values.new_full((len(values), spare + 1), absent)
    laid.scatter_(1, torch.where(place < 0, spare, place), values)
    return rearrange(laid[:, :spare], "b (count size) -> b count size", size=size)
