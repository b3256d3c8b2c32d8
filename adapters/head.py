"""Base class of heads, which predict values from hidden states instead of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encoders.arguments import Recorded


class Head(Recorded, nn.Module):
    """Base class: predicts a value from the backbone's hidden states at the slots of an answer.

    Heads for continuous actions (L1 regression, flow matching, diffusion) derive from it.

    Args:
        in_dim: backbone width D.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim

    def loss(self, hidden: Tensor, value: Tensor) -> Tensor:
        """Loss of each row, [B].

        Args:
            hidden: [B N D] final hidden states at the slots.
            value: target of each row, such as normalized actions [B K A].
        """
        raise TypeError(f"{type(self).__name__} does not define loss(hidden, value)")

    def sample(self, hidden: Tensor, generator: torch.Generator | None = None) -> Any:
        """Sampled value of each row.

        Args:
            hidden: [B N D] final hidden states at the slots.
            generator: random generator; None: torch's default.
        """
        raise TypeError(f"{type(self).__name__} does not define sample(hidden)")
