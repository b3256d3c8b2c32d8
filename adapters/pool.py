"""Pooling of tokens: 2-D on the grid of an image, or concatenated neighbours of a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from adapters.adapter import Adapter, rows_of
from adapters.mlp import MLP
from encoders.checks import Count
from encoders.features import Features, Prepared


class Pool(Adapter):
    """Projects with an `MLP` and pools: about 1 in factor**2 (grid) or factor tokens remains.

    bilinear, average and max pool the grid AFTER the projector; average and max drop a remainder at
    the edge (27 -> 13). bilinear resizes to ceil(side / factor) (27 -> 14); LaViDa's released code
    uses it as "2x2 average pooling" (jacklishufan/LaViDa: llava/model/llava_arch.py). concat
    concatenates `factor` neighbours BEFORE the projector, for sequences without a grid (audio).

    Args:
        in_dim: encoder width E.
        out_dim: backbone width D.
        kind: bilinear, average, max or concat.
        factor: factor by which the sides of the grid, or the length, shrink.
        layers: linear layers of the projector.
    """

    def __init__(
        self,
        in_dim: Count,
        out_dim: Count,
        kind: Literal["bilinear", "average", "max", "concat"] = "bilinear",
        factor: Count = 2,
        layers: Count = 2,
    ) -> None:
        super().__init__(in_dim, out_dim)
        self.kind, self.factor = kind, factor
        self.project = MLP(in_dim * factor if kind == "concat" else in_dim, out_dim, layers)

    def forward(self, features: Features) -> Features:
        """Pooled tokens of width D; a pooled token is valid if any of its tokens is.

        Args:
            features: tokens [B N E]; all kinds except concat need a grid.
        Raises:
            ValueError: no grid, or one smaller than `factor`.
        """
        if self.kind == "concat":
            return self.project(_stack(features, self.factor))
        return pool_grid(self.project(features), self.kind, self.factor)

    def carry(self, features: Features, items: Sequence[Prepared]) -> list[Tensor]:
        """See `Adapter.carry`."""
        if self.kind == "concat":
            return super().carry(features, items)
        return [row.tokens for row in rows_of(pool_grid(features, self.kind, self.factor))]


def pool_grid(
    features: Features, kind: Literal["bilinear", "average", "max"], factor: int
) -> Features:
    """Tokens pooled on their grid; a pooled token is real if any of its tokens is.

    Masked tokens are ignored.

    Args:
        features: tokens [B N D] on a grid.
        kind: see `Pool`.
        factor: sides of the grid shrink by this.
    Raises:
        ValueError: no grid, or one smaller than `factor`.
    """
    if features.grid is None:
        raise ValueError(
            f"Pool: kind={kind!r} needs a grid and {features.tokens.shape[1]} tokens came "
            "without one; use kind='concat' for sequences"
        )
    rows, columns = features.grid
    if kind != "bilinear" and min(rows, columns) < factor:
        raise ValueError(
            f"Pool: grid {features.grid} is smaller than factor={factor}; "
            "use kind='bilinear' or a smaller factor"
        )

    def shrink(image: Tensor) -> Tensor:
        if kind == "average":
            return functional.avg_pool2d(image, factor)
        size = (math.ceil(rows / factor), math.ceil(columns / factor))
        return functional.interpolate(image, size, mode="bilinear", align_corners=False)

    real = rearrange(features.mask, "B (Y X) -> B 1 Y X", Y=rows)
    tokens = rearrange(features.tokens, "B (Y X) D -> B D Y X", Y=rows)
    if kind == "max":
        low = torch.finfo(tokens.dtype).min
        pooled = functional.max_pool2d(torch.where(real, tokens, low), factor)
        weight = functional.max_pool2d(real.to(tokens.dtype), factor)
        pooled = torch.where(weight > 0, pooled, 0)
    else:
        # Weighted mean over the real tokens; with none masked the weight is 1.
        pooled = shrink(torch.where(real, tokens, 0))
        weight = shrink(real.to(tokens.dtype))
        pooled = pooled / weight.clamp_min(torch.finfo(tokens.dtype).tiny)
    return Features(
        rearrange(pooled, "B D Y X -> B (Y X) D"),
        rearrange(weight > 0, "B 1 Y X -> B (Y X)"),
        (pooled.shape[2], pooled.shape[3]),
    )


def _stack(features: Features, factor: int) -> Features:
    """Every `factor` neighbours concatenated along the width, [B ceil(N/factor) factor*E]."""
    extra = -features.tokens.shape[1] % factor
    real = functional.pad(features.mask, (0, extra))
    # Zeros at masked tokens, so that a row does not depend on the padding of its batch.
    tokens = torch.where(features.mask[:, :, None], features.tokens, 0)
    tokens = functional.pad(tokens, (0, 0, 0, extra))
    return Features(
        rearrange(tokens, "B (N f) E -> B N (f E)", f=factor),
        rearrange(real, "B (N f) -> B N f", f=factor).any(-1),
    )
