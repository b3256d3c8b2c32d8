"""The base of every adapter: features of one width in, features of the backbone's width out."""

from __future__ import annotations

from torch import Tensor, nn

from encoders.features import Features
from encoders.rebuild import Rebuildable


class Adapter(Rebuildable, nn.Module):
    """Brings features to the backbone: projects, pools or prunes them.

    Args:
        in_dim: encoder width E.
        out_dim: backbone width D.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = out_dim

    def forward(self, features: Features, query: Tensor | None = None) -> Features:
        """Features of width `out_dim`.

        Args:
            features: what the encoder gave, tokens [B N E].
            query: [B M D] embeddings of the prompt, for adapters that look at the question.
        """
        raise TypeError(f"{type(self).__name__} does not define forward(features, query)")
