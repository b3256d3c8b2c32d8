"""Fewer tokens by pooling: 2-D on a picture's grid, or stacked neighbours of a sequence."""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from adapters.adapter import Adapter
from adapters.mlp import MLP
from encoders.features import Features


class Pool(Adapter):
    """Projects with an `MLP` and pools, so that about 1 in factor**2 (grid) or factor tokens stays.

    bilinear, average and max work on the grid AFTER the projector; average and max drop a
    remainder at the edge (27 -> 13). bilinear resizes to ceil(side / factor) (27 -> 14) and is
    what LaViDa's released code runs as "2x2 average pooling" (jacklishufan/LaViDa:
    llava/model/llava_arch.py). concat joins `factor` neighbours along the width BEFORE the
    projector, for sequences without a grid such as audio.

    Args:
        in_dim: encoder width E.
        out_dim: backbone width D.
        kind: bilinear, average, max or concat.
        factor: grid sides, or the length, shrink by this.
        layers: linear layers of the projector.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kind: Literal["bilinear", "average", "max", "concat"] = "bilinear",
        factor: int = 2,
        layers: int = 2,
    ) -> None:
        super().__init__(in_dim, out_dim)
        if kind not in ("bilinear", "average", "max", "concat"):
            raise ValueError(
                f"Pool: kind={kind!r}; expected 'bilinear', 'average', 'max' or 'concat'"
            )
        if factor < 1:
            raise ValueError(f"Pool: factor={factor}, expected at least 1")
        self.kind, self.factor = kind, factor
        self.project = MLP(in_dim * factor if kind == "concat" else in_dim, out_dim, layers)

    def forward(self, features: Features) -> Features:
        """Pooled tokens of width D; a pooled token is real if any token it covers is.

        Args:
            features: tokens [B N E]; every kind but concat needs their grid.
        Raises:
            ValueError: no grid, or one smaller than `factor`.
        """
        if self.kind == "concat":
            return self.project(_stack(features, self.factor))
        if features.grid is None:
            raise ValueError(
                f"Pool: kind={self.kind!r} needs a grid and {features.tokens.shape[1]} tokens came "
                "without one; use kind='concat' for sequences"
            )
        if self.kind != "bilinear" and min(features.grid) < self.factor:
            raise ValueError(
                f"Pool: grid {features.grid} is smaller than factor={self.factor}; "
                "use kind='bilinear' or a smaller factor"
            )
        return self._pool(self.project(features), features.grid)

    def _pool(self, features: Features, grid: tuple[int, int]) -> Features:
        """Pools projected features on their grid; what stands at mask False never counts."""
        rows, columns = grid
        real = rearrange(features.mask, "B (Y X) -> B 1 Y X", Y=rows)
        tokens = rearrange(features.tokens, "B (Y X) D -> B D Y X", Y=rows)
        if self.kind == "max":
            low = torch.finfo(tokens.dtype).min
            pooled = functional.max_pool2d(torch.where(real, tokens, low), self.factor)
            weight = functional.max_pool2d(real.to(tokens.dtype), self.factor)
            pooled = torch.where(weight > 0, pooled, 0)
        else:
            # Weighted mean over the real tokens; with none masked the weight is 1.
            pooled = self._shrink(torch.where(real, tokens, 0), rows, columns)
            weight = self._shrink(real.to(tokens.dtype), rows, columns)
            pooled = pooled / weight.clamp_min(torch.finfo(tokens.dtype).tiny)
        return Features(
            rearrange(pooled, "B D Y X -> B (Y X) D"),
            rearrange(weight > 0, "B 1 Y X -> B (Y X)"),
            (pooled.shape[2], pooled.shape[3]),
        )

    def _shrink(self, picture: Tensor, rows: int, columns: int) -> Tensor:
        if self.kind == "average":
            return functional.avg_pool2d(picture, self.factor)
        size = (math.ceil(rows / self.factor), math.ceil(columns / self.factor))
        return functional.interpolate(picture, size, mode="bilinear", align_corners=False)


def _stack(features: Features, factor: int) -> Features:
    """Each `factor` neighbours joined along the width, [B ceil(N/factor) factor*E]."""
    extra = -features.tokens.shape[1] % factor
    real = functional.pad(features.mask, (0, extra))
    # Zeros where nothing is real, so that a row does not depend on how far its batch pads it.
    tokens = torch.where(features.mask[:, :, None], features.tokens, 0)
    tokens = functional.pad(tokens, (0, 0, 0, extra))
    return Features(
        rearrange(tokens, "B (N f) E -> B N (f E)", f=factor),
        rearrange(real, "B (N f) -> B N f", f=factor).any(-1),
    )
