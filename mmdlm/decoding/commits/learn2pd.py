"""A small network that knows from the confidences which predictions are final."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdlm.backbones.kv import take
from mmdlm.decoding import aux_network
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.numerics import odds_of
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy

KIND = "learn2pd filter"
# What a position says that is not there: nothing is in doubt about it.
ABSENT = 1.0


class Filter(nn.Module):
    """Two linear layers from the confidences of a block to whether each prediction is final.

    Args:
        size: positions of a block.
        hidden: width between the layers. None: `size`, which makes 2112 weights of blocks of 32,
            the 2-layer network of about 2 thousand weights of the paper; its file
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
    """Commits what a learned filter holds for final, and the best as many as a schedule wants.

    The filter sees the probabilities of all predictions of the block at once, those of positions
    already written included. `mmdlm.training.learn2pd` trains one for a model. A window longer
    than the filter's block is cut into such blocks; of positions that the window or the step lacks
    it is told probability 1. Without a filter only the schedule is left, which is `TopK`.

    Source: ims-kdks/Learning-to-Parallel-Decoding: llada/generate.py (generate_learn2parallel).
    Its end-of-text prediction is a strategy of its own.

    Args:
        filter: safetensors file of a trained filter; None: there is none.
        accept: probability of being final that a position must exceed.
        steps: steps of the schedule for the whole answer; None: one position per step.
    """

    paper: ClassVar[str] = "Learn2PD, arXiv 2509.25188"
    sees: ClassVar = "window"

    filter: str | Path | None = None
    accept: float = 0.9
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.accept >= 0:
            raise ValueError(f"Learn2PD.accept is {self.accept}, expected a probability")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Learn2PD.steps is {self.steps}, expected at least 1")

    def begin(self, state: DecodeState) -> None:
        """Loads the filter."""
        if self.filter is not None:
            network = aux_network.load(self.filter, KIND, Filter).to(state.tokens.device)
            state.memory[(self, "filter")] = network

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool."""
        scheduled = TopK(self.steps).select(state)
        if self.filter is None:
            return scheduled
        network = state.memory[(self, "filter")]
        place, count = places(state), blocks(state, network.size)
        final = network(gathered(state.probability, place, count, network.size)).flatten(1)
        accepted = final.gather(1, place.clamp(min=0)) > odds_of(self.accept)
        return scheduled | accepted


def places(state: DecodeState) -> Tensor:
    """[B R] int64, which position of its row's window each read one is, counted from 0.

    -1 where a position is read outside the window or a second time.
    """
    within = state.within()
    number = take(within.long().cumsum(1) - 1, state.at)
    return number.masked_fill(~state.here(within), -1)


def blocks(state: DecodeState, size: int) -> int:
    """How many blocks of a size hold any row's window."""
    return -(-(state.window.stop - state.window.start) // size)


def gathered(
    values: Tensor, place: Tensor, count: int, size: int, absent: float = ABSENT
) -> Tensor:
    """[B count size] values [B R] at their places [B R], `absent` where there is none."""
    spare = count * size  # a column for what has no place
    laid = values.new_full((len(values), spare + 1), absent)
    laid.scatter_(1, torch.where(place < 0, spare, place), values)
    return rearrange(laid[:, :spare], "b (count size) -> b count size", size=size)
