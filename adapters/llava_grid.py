"""Projects the views of an image and merges them into one sequence, as LLaVA-NeXT does.

Source: jacklishufan/LaViDa and ML-GSAI/LLaDA-V: llava/model/llava_arch.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from adapters.adapter import Adapter, Embedded
from adapters.mlp import MLP
from adapters.pool import pool_grid
from encoders.checks import Count
from encoders.features import Features, Prepared, Size

MERGES = ("flat", "spatial", "spatial_unpad")


class LlavaGrid(Adapter):
    """Projects every view, pools it, and merges overview and tiles of an image.

    The overview comes first. With "spatial" the tokens of all tiles follow as one row-major map;
    "spatial_unpad" first cuts off what lies on the padding of the canvas, then shrinks a map that
    is too large, then ends every row with the learnt vector `newline`. An image of a single view
    is its tokens, and with "spatial_unpad" one `newline`. "flat" joins the views one after another.

    LaViDa pools each view from 27x27 to 14x14 ("bilinear", factor 2); LLaDA-V does not pool and
    shrinks maps above 4 tiles.

    Args:
        in_dim: encoder width E.
        out_dim: backbone width D.
        merge: see above, `mm_patch_merge_type` of the sources.
        pool: bilinear, average or max pooling of each projected view, see `adapters.pool.Pool`;
            None keeps every token.
        factor: sides of a view shrink by this.
        most_tiles: shrink a map of more than 1.1^2 times the tokens of this many tiles to about
            their number ("spatial_unpad" only, `anyres_max_N` of the sources); None never does.
        layers: linear layers of the projector.
        rounded: round the size of an unpadded map to 7 digits before it is cut to an integer, as
            transformers' LLaVA-OneVision does (models/llava_onevision/modeling_llava_onevision.py).
    """

    KEYS: ClassVar[dict[str, str]] = {
        "project.layers.{i}.weight": "model.mm_projector.{i}.weight",
        "project.layers.{i}.bias": "model.mm_projector.{i}.bias",
        "newline": "model.image_newline",
    }

    def __init__(
        self,
        in_dim: Count,
        out_dim: Count,
        merge: Literal["flat", "spatial", "spatial_unpad"] = "spatial_unpad",
        pool: Literal["bilinear", "average", "max"] | None = None,
        factor: Count = 2,
        most_tiles: Count | None = None,
        layers: Count = 2,
        rounded: bool = False,
    ) -> None:
        super().__init__(in_dim, out_dim)
        if most_tiles is not None and merge != "spatial_unpad":
            raise ValueError(
                f"LlavaGrid: most_tiles={most_tiles} has no effect with merge={merge!r}; drop it"
            )
        self.merge, self.pool, self.factor, self.most_tiles = merge, pool, factor, most_tiles
        self.rounded = rounded
        self.project = MLP(in_dim, out_dim, layers)
        if merge == "spatial_unpad":
            self.newline = nn.Parameter(torch.randn(out_dim) / math.sqrt(out_dim))

    def forward(self, features: Features) -> Features:
        """The projected and pooled tokens of each view, not merged.

        Args:
            features: tokens [B N E] on a grid, one row per view.
        Raises:
            ValueError: pooling without a grid, or one smaller than `factor`.
        """
        out = self.project(features)
        return out if self.pool is None else pool_grid(out, self.pool, self.factor)

    def embed(self, features: Features, items: Sequence[Prepared]) -> list[Embedded]:
        """The merged views of each image.

        Args:
            features: tokens [V_0 + V_1 + ... N E] on a grid, all real.
            items: preprocessed images, views [V 3 Y X] or one [3 Y X]; several views need `size`,
                the original size of the image, and `grid`, its tiles per axis.
        Raises:
            ValueError: rows and views differ, a token is padding, or a grid does not fit.
        """
        newline = self.newline if self.merge == "spatial_unpad" else None
        return self._merge(self(features), items, newline)

    def carry(self, features: Features, items: Sequence[Prepared]) -> list[Tensor]:
        """See `Adapter.carry`."""
        newline = features.tokens.new_zeros(features.tokens.shape[2])
        pooled = features if self.pool is None else pool_grid(features, self.pool, self.factor)
        return [item.tokens for item in self._merge(pooled, items, newline)]

    def _merge(
        self, views: Features, items: Sequence[Prepared], newline: Tensor | None
    ) -> list[Embedded]:
        """The merged views of each image, with a vector [D] that ends rows ("spatial_unpad")."""
        counts = [1 if item.tensor.ndim == 3 else len(item.tensor) for item in items]
        if sum(counts) != len(views.tokens):
            raise ValueError(
                f"LlavaGrid: {len(views.tokens)} rows of features for {sum(counts)} views of "
                f"{len(items)} images; expected one row per view"
            )
        if views.grid is None or not bool(views.mask.all()):
            raise ValueError(
                "LlavaGrid: the tokens of a view are padded or have no grid; use an encoder of "
                "square images, such as encoders.anyres.AnyRes"
            )
        return [
            self._merged(rows, item, views.grid, newline)
            for rows, item in zip(views.tokens.split(counts), items, strict=True)
        ]

    def _merged(
        self, views: Tensor, item: Prepared, grid: Size, newline: Tensor | None
    ) -> Embedded:
        """One image of its views [V N D]."""
        overview, rest = views[0], views[1:]
        if self.merge == "flat" or not len(rest):
            tokens = views.flatten(0, 1)  # [V*N D]
            if self.merge != "spatial_unpad":
                return Embedded(tokens, None if len(rest) else grid)
            return Embedded(torch.cat([tokens, newline[None].to(tokens)]))
        if math.prod(item.grid) != len(rest) or len(item.grid) != 2:
            raise ValueError(
                f"LlavaGrid: an image has {len(rest)} tiles besides the overview and tiles per "
                f"axis {item.grid}; expected rows x columns of them, see encoders.anyres.AnyRes"
            )
        tile = {"r": item.grid[0], "c": item.grid[1], "y": grid[0], "x": grid[1]}
        whole = rearrange(rest, "(r c) (y x) D -> D (r y) (c x)", **tile)
        if self.merge == "spatial_unpad":
            whole = self._shrunk(unpad(whole, item.size, self.rounded), grid)
            ends = newline[:, None, None].to(whole).expand(-1, whole.shape[1], 1)
            whole = torch.cat([whole, ends], 2)  # [D Y X+1]
        return Embedded(torch.cat([overview, rearrange(whole, "D Y X -> (Y X) D")]))

    def _shrunk(self, whole: Tensor, grid: Size) -> Tensor:
        """A map [D Y X], smaller if it is larger than `most_tiles` allows."""
        if self.most_tiles is None:
            return whole
        rows, columns = whole.shape[1:]
        # The source takes tiles to be square.
        times = math.sqrt(rows * columns / (self.most_tiles * grid[0] ** 2))
        if times <= 1.1:
            return whole
        size = (max(1, int(rows // times)), max(1, int(columns // times)))
        return functional.interpolate(whole[None], size, mode="bilinear", align_corners=False)[0]


def unpad(whole: Tensor, size: tuple[int, ...], rounded: bool = False) -> Tensor:
    """A map without the rows or columns that lie on the padding of its canvas.

    Padding is cut off in equal halves, so that one row or column of it may stay.

    Args:
        whole: [D Y X] features of a canvas with a centred image.
        size: rows and columns of that image in pixels, before it was scaled.
        rounded: see `LlavaGrid`.
    Raises:
        ValueError: the size is missing.
    """
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"LlavaGrid: original size {size}; expected rows and columns in pixels")
    (height, width), (rows, columns) = size, whole.shape[1:]
    if width / height > columns / rows:
        inner = height * (columns / width)
        cut = (rows - int(round(inner, 7) if rounded else inner)) // 2
        return whole[:, cut : rows - cut]
    inner = width * (rows / height)
    cut = (columns - int(round(inner, 7) if rounded else inner)) // 2
    return whole[:, :, cut : columns - cut]
