"""LocalLeap: a lower threshold near confident positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.checks import Cutoff, NonNegativeInt
from mmdlm.decoding.numerics import odds_of
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class LocalLeap(Strategy):
    """LocalLeap: commits positions that reach `tau`, and those near them that reach `relaxed`.

    Positions that reach `tau` in this step are anchors. Positions at most `radius` from an anchor
    need to reach `relaxed` only. Tokens committed in earlier steps are not anchors. The best
    position always commits.

    Source: friedrichor/LocalLeap: generate.py. We checked a copy in another repository, not the
    file itself. Its early stop is `EndOfText`.

    Args:
        tau: probability of an anchor.
        relaxed: probability required near an anchor, at most `tau`.
        radius: positions to either side; 0 makes it `Threshold`.
    """

    paper: ClassVar[str] = "LocalLeap, arXiv 2510.07081"

    tau: Cutoff = 0.9
    relaxed: Cutoff = 0.75
    radius: NonNegativeInt = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relaxed > self.tau:
            raise ValueError(
                f"LocalLeap.relaxed is {self.relaxed}, expected at most tau ({self.tau})"
            )

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        anchors = view.open & (view.log_odds >= odds_of(self.tau))
        canvas = torch.zeros_like(view.tokens, dtype=torch.float32)
        canvas = view.placed(canvas, anchors, 1)
        # The maximum within the radius is 1 where an anchor is near.  [B L]
        near = F.max_pool1d(canvas[:, None], 2 * self.radius + 1, 1, self.radius)[:, 0]
        nearly = view.log_odds >= odds_of(self.relaxed)
        return anchors | (nearly & view.here(near > 0))
