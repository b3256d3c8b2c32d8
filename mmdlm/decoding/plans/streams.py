"""Several parts of the answer filled side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.numerics import rank
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy, Window


@dataclass(frozen=True)
class Streams(Strategy):
    """Gives every part of the answer the same share of each step, the most confident inside it.

    Meant for models whose answer holds several lines of reasoning and then a summary: the streams
    go first, in lock-step; what lies behind the last of them opens when all are full.

    Source: parallel-forced decoding of NAP (arXiv 2602.23225; pixeli99/NAP: README.md). From the
    paper's description, not checked against its code, of which only the training is public.

    Args:
        count: streams of equal size that make up the whole answer; `sizes` instead where they
            differ, or something follows.
        sizes: positions of each stream, from the start of the answer.
        steps: steps for the whole answer; None: one token per stream and step.
    """

    paper: ClassVar[str] = "NAP, arXiv 2602.23225"

    count: int = 4
    sizes: tuple[int, ...] | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(self.sizes))
            if not self.sizes or min(self.sizes) < 1:
                raise ValueError(f"Streams.sizes is {self.sizes}, expected numbers of positions")
        for name in ("count", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"Streams.{name} is {getattr(self, name)}, expected at least 1")

    def begin(self, state: DecodeState) -> None:
        """Compares the streams with the answer.

        Raises:
            ValueError: the answer is shorter.
        """
        if self.sizes is not None and sum(self.sizes) > state.asked:
            raise ValueError(
                f"Streams.sizes {self.sizes} are {sum(self.sizes)} positions, but the answer has "
                f"{state.asked}; give a longer one, or smaller streams"
            )

    def plan(self, state: DecodeState) -> Window:
        """All streams, then what lies behind; an empty window when nothing is left."""
        sizes = self._sizes(state)
        end = min(state.prompt + sum(sizes), state.length)
        if state.left[:, state.prompt : end].any():
            state.turn_size = sum(sizes)
            return Window(state.prompt, end)
        state.turn_size = max(state.length - state.prompt, state.asked) - sum(sizes)
        return Window(end if state.left.any() else state.length, state.length)

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool."""
        start, device = state.window.start, state.at.device
        sizes = self._sizes(state) if start == state.prompt else [state.size]
        steps = max(sizes) if self.steps is None else state.share(self.steps)
        if state.block_step >= steps - 1:
            return state.open
        edges = torch.tensor(sizes, device=device).cumsum(0)
        stream = torch.bucketize(state.at - start, edges, right=True)  # [B R]
        column = torch.arange(state.prompt, state.length, device=device) - start
        column = torch.bucketize(column, edges, right=True).masked_fill(column < 0, -1)  # [G]
        # Counted anew in every step, so that nothing is lost when another row changes its length.
        was_open = state.commit_step >= state.step - state.block_step
        was_open |= state.masked[:, state.prompt :]
        taken = torch.zeros_like(state.open)
        for i in range(len(sizes)):
            masks = (was_open & (column == i)).sum(1)
            quota = masks // steps + (state.block_step < masks % steps)
            inside = stream == i
            place = rank(state.confidence.masked_fill(~inside, -torch.inf))
            taken |= inside & (place < quota[:, None])
        return taken

    def _sizes(self, state: DecodeState) -> list[int]:
        """Positions of each stream."""
        if self.sizes is not None:
            return list(self.sizes)
        each, more = divmod(state.asked, self.count)
        return [each + (i < more) for i in range(self.count)]
