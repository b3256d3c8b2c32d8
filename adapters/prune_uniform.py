"""Keep evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.pruner import Pruner, Seen


@dataclass(frozen=True)
class Uniform(Pruner):
    """Keeps evenly spaced tokens, whatever they hold: what every other pruner must be better than.

    On a grid, evenly spaced rows and columns would keep the square of a share only; the tokens are
    therefore spaced along the row-major sequence.
    """

    def select(self, seen: Seen) -> Tensor:
        """See `Pruner.select`."""
        count, total = self.count(len(seen.tokens)), len(seen.tokens)
        at = (torch.arange(count, device=seen.tokens.device) + 0.5) * (total / count)
        return at.long()
