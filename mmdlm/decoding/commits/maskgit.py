"""MaskGIT: numbers of tokens per step from a curve (cosine, linear, ...)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from encoders.checks import PositiveInt
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.schedules import Counts, due, lasts, quotas, share
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class MaskGIT(Strategy):
    """MaskGIT: commits the most confident positions; a curve sets the number per step.

    The share of a block that is still masked after step i of S falls from 1 to 0 as a function of
    r = (i + 1) / S: "linear" 1 - r; "cosine" cos(pi r / 2), few first and many last; "pow2" (any
    exponent K) 1 - r^K; "exp" 1 - n^(r - 1) and "log" -log r / log n for n masks. Masks are whole,
    so with about as many steps as masks some steps commit nothing; their forward is spent all the
    same. The last step commits whatever is left.

    Source: MaskGIT (arXiv 2202.04200, section 3.3), with the curves of autonomousvision/mdpo:
    src/llada/generate.py (get_num_transfer_tokens_maskgit).

    Args:
        steps: steps for the whole answer, split evenly over the blocks; None: one per token.
        schedule: name of the curve, see above.
    """

    paper: ClassVar[str] = "MaskGIT, arXiv 2202.04200"
    may_idle: ClassVar[bool] = True

    steps: PositiveInt | None = None
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        share(1, 1, self.schedule)

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        return rank(view.confidence) < due(view, *self._schedule(view))[:, None]

    def lasts(self, view: View) -> bool:
        """[B R] bool, as many as the schedule commits in this step."""
        return lasts(view, *self._schedule(view))

    def _schedule(self, view: View) -> tuple[Tensor, Counts]:
        """Steps of each row's block, and how many commit in each."""
        steps = view.share(view.asked if self.steps is None else self.steps)
        return steps, lambda masks, steps: quotas(masks, steps, self.schedule)
