"""Prophet: commit everything once the mean logit margin is large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from encoders.checks import Limit, NonNegativeInt, PositiveInt
from mmdlm.decoding.memory import Entry, PerAnswer
from mmdlm.decoding.numerics import logit_margin
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Prophet(Strategy):
    """Prophet: commits all masks of a row once its mean logit margin reaches a bar.

    The margin is the difference of the two highest logits, after the strategies before this one in
    the list. Its mean must reach a bar that falls with the share of steps done: `early` in the
    first third, `mid` in the second, `late` in the last. The candidates are written.

    A step sees, and can commit, only what it computes: everything without a cache, only the block
    between the full passes of `DualCache`. Logits of earlier steps are not used.

    Source: Prophet (arXiv 2508.19982; pixeli99/Prophet: generate_earlyexit.py), whose region is the
    5 positions after an answer template.

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

    early: Limit = 7.5
    mid: Limit = 5.0
    late: Limit = 2.5
    steps: PositiveInt | None = None
    region: tuple[NonNegativeInt, PositiveInt] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.region is not None and self.region[0] >= self.region[1]:
            raise ValueError(
                f"Prophet.region is {self.region}, expected (first, last + 1) of the answer"
            )

    def begin(self, view: View) -> dict[str, Entry]:
        """Room for the margins of a step.

        Raises:
            ValueError: the region begins after the end of the answer.
        """
        size = view.length - view.prompt
        if self.region is not None and self.region[0] >= size:
            raise ValueError(
                f"Prophet.region begins at {self.region[0]}, but the answer has {size} positions; "
                "give a longer answer or another region"
            )
        return {"margin": PerAnswer(torch.zeros_like(view.commit_confidence))}

    def observe(self, view: View, logits: Tensor) -> None:
        """Notes the margin of each scored position."""
        mine, real = view.memory(self), view.here(torch.ones_like(view.masked))
        mine["margin"] = view.placed(mine["margin"], real, logit_margin(view, logits), view.prompt)

    def stop(self, view: View) -> Tensor:
        """[B] bool."""
        at = view.at - view.prompt
        if self.region is None:
            counted = view.here(view.masked)
        else:
            real = view.here(view.sequence.mask)
            counted = real & (at >= self.region[0]) & (at < self.region[1])
        margin = view.memory(self)["margin"].gather(1, at)
        mean = margin.masked_fill(~counted, 0.0).sum(1) / counted.sum(1).clamp(min=1)
        steps = view.lengths if self.steps is None else self.steps
        bar = self.bar(view.step + 1, steps).to(mean)
        return counted.any(1) & (mean >= bar)

    def bar(self, done: Tensor, steps: int | Tensor) -> Tensor:
        """[B] float32, what the mean margin must reach.

        Args:
            done: [B] steps done, the current one included.
            steps: number of all steps, or [B].
        """
        progress = done.double() / steps
        later = torch.where(progress < 0.67, self.mid, self.late)
        return torch.where(progress < 0.33, self.early, later)
