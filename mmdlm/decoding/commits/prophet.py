"""Commit everything once the answer is decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmdlm.decoding.compatibility import aligned
from mmdlm.decoding.numerics import lead
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class Prophet(Strategy):
    """Commits all masks of a row when its best tokens lead the second best by enough.

    The lead is the difference of the two highest logits, as they are where this strategy stands in
    the list; its mean must reach a bar that is lower the more of the steps are done: `early` in the
    first third, `mid` in the second, `late` in the last. What is written are the candidates.

    A step sees, and can commit, only what it computes: everything without a cache, only the block
    between the full passes of `DualCache`. Logits of earlier steps are not used. Steps in which a
    row waits for others do not count.

    Source: Prophet (arXiv 2508.19982; pixeli99/Prophet: generate_earlyexit.py), whose region is the
    5 positions behind an answer template.

    Args:
        early: bar until 33 % of the steps are done; infinity never stops.
        mid: bar from there to 67 %.
        late: bar from there on.
        steps: steps of the whole answer that the shares are of; None: one per position.
        region: first and last + 1 position of the answer (0 is its first) that are looked at,
            whether masked or not, as far as the answer goes; None: all masks.
    """

    paper: ClassVar[str] = "Prophet, arXiv 2508.19982"
    sees: ClassVar[Literal["answer"]] = "answer"
    # It computes for every row what any row needs, which rows alone would not look at.
    excludes: ClassVar[tuple[str, ...]] = ("SubBlockCache",)

    early: float = 7.5
    mid: float = 5.0
    late: float = 2.5
    steps: int | None = None
    region: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("early", "mid", "late"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Prophet.{name} is {getattr(self, name)}, expected 0 or more")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Prophet.steps is {self.steps}, expected at least 1")
        if self.region is not None:
            object.__setattr__(self, "region", tuple(self.region))  # YAML has lists only
            if len(self.region) != 2 or not 0 <= self.region[0] < self.region[1]:
                raise ValueError(
                    f"Prophet.region is {self.region}, expected (first, last + 1) of the answer"
                )

    def begin(self, state: DecodeState) -> None:
        """Starts to count the steps of each row.

        Raises:
            ValueError: the region begins behind the answer, or see `aligned`.
        """
        aligned(self, state)
        size = state.length - state.prompt
        if self.region is not None and self.region[0] >= size:
            raise ValueError(
                f"Prophet.region begins at {self.region[0]}, but the answer has {size} positions; "
                "give a longer answer or another region"
            )
        state.memory[self, "steps"] = state.commit_step.new_zeros(len(state.tokens))

    def guide(self, state: DecodeState, logits: Tensor) -> Tensor:
        """[B R V], the logits as they were."""
        state.memory[self, "lead"] = lead(state, logits)
        return logits

    def stop(self, state: DecodeState) -> Tensor:
        """[B] bool."""
        busy, at = state.open.any(1), state.at - state.prompt
        state.memory[self, "steps"] = done = state.memory[self, "steps"] + busy
        if self.region is None:
            looked = state.here(state.masked)
        else:
            real = state.here(torch.ones_like(state.masked))
            looked = real & (at >= self.region[0]) & (at < self.region[1])
        total = state.memory[self, "lead"].masked_fill(~looked, 0.0).sum(1)
        mean = total / looked.sum(1).clamp(min=1)
        bar = self.bar(done, self.steps or state.length - state.prompt)
        return busy & looked.any(1) & (mean >= bar)

    def bar(self, done: Tensor, steps: int) -> Tensor:
        """[B] float32, what the mean lead must reach.

        Args:
            done: [B] steps done, the current one included.
            steps: number of all steps.
        """
        progress = done.double() / steps
        later = torch.where(progress < 0.67, self.mid, self.late)
        return torch.where(progress < 0.33, self.early, later)
