"""Pixel shuffle: concatenates neighbouring image tokens along the feature axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from adapters.adapter import Adapter, rows_of
from adapters.mlp import MLP
from adapters.pool import pool_grid
from encoders.features import Features, Prepared


class PixelShuffle(Adapter):
    """Concatenates factor x factor neighbours of the grid into one token, then projects.

    Source: space-to-depth of OpenGVLab/InternVL: internvl_chat (there with a factor of 2).

    Args:
        in_dim: encoder width E.
        out_dim: backbone width D.
        factor: factor by which the sides of the grid shrink.
        layers: linear layers of the projector.
    """

    def __init__(self, in_dim: int, out_dim: int, factor: int = 2, layers: int = 2) -> None:
        super().__init__(in_dim, out_dim)
        if factor < 1:
            raise ValueError(f"PixelShuffle: factor={factor}, expected at least 1")
        self.factor = factor
        self.project = MLP(in_dim * factor**2, out_dim, layers)

    def forward(self, features: Features) -> Features:
        """Tokens [B N/factor^2 D]; a merged token is valid if any of its parts is.

        Args:
            features: tokens [B N E] with a grid whose sides are multiples of the factor.
        Raises:
            ValueError: there is no such grid.
        """
        grid, f = features.grid, self.factor
        if grid is None or grid[0] % f or grid[1] % f:
            raise ValueError(
                f"PixelShuffle: grid is {grid}, expected sides divisible by factor={f}; "
                "choose another patch size"
            )
        size = {"y": grid[0] // f, "x": grid[1] // f, "a": f, "b": f}
        # Masked tokens are undefined, and a merged token can be partly valid.
        tokens = torch.where(features.mask[:, :, None], features.tokens, 0)
        tokens = rearrange(tokens, "n (y a x b) e -> n (y x) (a b e)", **size)
        mask = rearrange(features.mask, "n (y a x b) -> n (y x) (a b)", **size).any(-1)
        merged = Features(tokens, mask, (size["y"], size["x"]))
        return self.project(merged)

    def carry(self, features: Features, items: Sequence[Prepared]) -> list[Tensor]:
        """See `Adapter.carry`; the mean of the tokens that are concatenated."""
        return [row.tokens for row in rows_of(pool_grid(features, "average", self.factor))]
