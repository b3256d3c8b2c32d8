"""Any-resolution images: an overview and the tiles of a larger canvas, for any image encoder.

Source: jacklishufan/LaViDa and ML-GSAI/LLaDA-V: llava/mm_utils.py, llava/train/train.py.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from encoders.checks import Checked, Side
from encoders.encoder import Encoder
from encoders.features import Features, Prepared, Size
from encoders.image import ImageInput, as_rgb
from encoders.merging import Merging
from encoders.vit import ViT

MOST_TILES = 64  # per side of a canvas
Pair = tuple[int, int]
Mode = Literal["anyres", "pad", "square"]


@dataclass(frozen=True)
class AnyResInput(Checked):
    """Square views of one image.

    "anyres" picks a canvas (`best_canvas`), scales the image into its middle on black, and cuts it
    into tiles, row by row; the first view is the whole image, resized without keeping its aspect.
    "pad" pads the image to a square with the mean colour and "square" resizes it without keeping
    its aspect; both give one view.

    Args:
        view: normalises one view and holds its side.
        canvases: (width, height) in pixels, multiples of the side, to choose from ("anyres" only).
        mode: what becomes of an image.
    """

    view: ImageInput
    canvases: tuple[tuple[Side, Side], ...] = ()
    mode: Mode = "anyres"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "anyres":
            return
        if not self.canvases:
            raise ValueError(
                "AnyRes: mode='anyres' without canvases; pass their (width, height) in pixels"
            )
        side = self.view.size
        wrong = [pair for pair in self.canvases if min(pair) < side or any(n % side for n in pair)]
        if wrong:
            raise ValueError(
                f"AnyRes: canvas {wrong[0]}; expected a width and height that are multiples of the "
                f"encoder's {side} pixels"
            )

    def __call__(self, item: Any) -> Prepared:
        """Views [V 3 side side] float32 of an image, its original size, and its tiles per axis.

        Args:
            item: see `ImageInput`.
        Raises:
            TypeError: not an image.
            ValueError: an image that cannot be read.
        """
        image = as_rgb(item)
        size, side = (image.height, image.width), self.view.size
        if self.mode == "anyres":
            width, height = best_canvas(image.size, self.canvases)
            views = [_resized(image, (side, side)), *tiles(fit(image, (width, height)), side)]
            grid: tuple[int, ...] = (height // side, width // side)
        else:
            if self.mode == "pad":
                image = pad_to_square(image, tuple(int(255 * mean) for mean in self.view.mean))
            views, grid = [_resized(image, (side, side))], ()
        pixels = torch.from_numpy(np.stack([np.asarray(view) for view in views]))  # [V Y X C]
        return Prepared("image", self.view.normalize(pixels), size, grid)

    @property
    def several(self) -> AnyResInput:
        """What an example with several images takes: one padded view of each, not anyres."""
        return replace(self, mode="pad") if self.mode == "anyres" else self


class AnyRes(Encoder):
    """An image encoder whose images are cut into views; each view is encoded by itself.

    An adapter merges the views of an image, such as `adapters.llava_grid.LlavaGrid`. The original
    size and the tiles per axis (rows, columns) travel in `Prepared.size` and `Prepared.grid`.

    Args:
        encoder: encodes square images; its `preprocess` is an `ImageInput`.
        pinpoints: canvases to choose from, see `parse_pinpoints`.
        mode: see `AnyResInput`.
    """

    kind = "image"

    def __init__(
        self,
        encoder: Encoder,
        pinpoints: str | Sequence[Sequence[int]] = (),
        mode: Mode = "anyres",
    ) -> None:
        super().__init__()
        view = getattr(encoder, "preprocess", None)
        if not isinstance(view, ImageInput):
            raise ValueError(
                f"AnyRes: encoder is a {type(encoder).__name__}; expected one of square images, "
                "such as encoders.vit.ViT"
            )
        self.encoder = encoder
        self.dim = encoder.dim
        self.size = view.size
        self.preprocess = AnyResInput(view, parse_pinpoints(pinpoints, view.size), mode)

    @property
    def attention_layer(self) -> tuple[nn.Module, int, int] | None:
        """See `Encoder.attention_layer`."""
        return self.encoder.attention_layer

    @property
    def grid(self) -> Size:
        """Rows and columns of the tokens of a view."""
        return self.encoder.grid

    @property
    def can_merge(self) -> bool:
        """See `Encoder.can_merge`."""
        return self.encoder.can_merge

    def merged(self, items: Sequence[Prepared], merging: Merging) -> tuple[Features, Tensor]:
        """See `Encoder.merged`; each view by itself."""
        return self.encoder.merged(items, merging)

    @property
    def records_attention(self) -> bool:
        """See `Encoder.records_attention`."""
        return self.encoder.records_attention

    def forward(self, items: Sequence[Prepared]) -> Features:
        """One row per view, the views of an item in order: tokens [V_0 + V_1 + ... N E].

        Args:
            items: images with views [V 3 side side].
        """
        return self.encoder(items)

    @classmethod
    def tiny(cls) -> Self:
        """A `ViT.tiny` of 16x16 pixels with canvases of up to 2x2 tiles."""
        return cls(ViT.tiny(), [[16, 32], [32, 16], [32, 32]])

    @staticmethod
    def example(seed: int = 0) -> np.ndarray:
        """A random [20 24 3] uint8 image."""
        return ViT.example(seed)


def parse_pinpoints(value: str | Sequence[Sequence[int]], side: int) -> tuple[Pair, ...]:
    """Canvases as (width, height) in pixels.

    Args:
        value: such pairs; the same as text, "[(384, 768), ...]"; or the first and the last canvas
            in tiles, "(1x1),...,(6x6)", for every pair between them.
        side: side of a tile in pixels.
    Raises:
        ValueError: none of these.
    """
    given = value
    if isinstance(value, str):
        pairs = [(int(i), int(j)) for i, j in re.findall(r"\((\d+)x(\d+)\)", value)]
        if pairs:
            (low, left), (high, right) = pairs[0], pairs[-1]
            if max(high, right) > MOST_TILES:
                raise ValueError(
                    f"AnyRes: pinpoints {given!r}; expected at most {MOST_TILES} tiles per side"
                )
            value = [
                (side * i, side * j) for i in range(low, high + 1) for j in range(left, right + 1)
            ]
        else:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                value = None
    try:
        return tuple((int(width), int(height)) for width, height in value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"AnyRes: pinpoints {given!r}; expected [(width, height), ...] in pixels or "
            "'(1x1),...,(6x6)' in tiles"
        ) from error


def best_canvas(size: Pair, canvases: Sequence[Pair]) -> Pair:
    """The canvas that shows the most pixels of an image, and wastes the least on ties.

    An image that is scaled up shows no more than its own pixels. Earlier canvases win full ties.

    Args:
        size: (width, height) of the image.
        canvases: (width, height) each, at least one.
    """

    def merit(canvas: Pair) -> Pair:
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def fit(image: Image.Image, canvas: Pair) -> Image.Image:
    """The image scaled (bicubic) to fill one axis of a black canvas (width, height), centred."""
    across, down = canvas[0] / image.width, canvas[1] / image.height
    if across < down:
        inner = (canvas[0], min(math.ceil(image.height * across), canvas[1]))
    else:
        inner = (min(math.ceil(image.width * down), canvas[0]), canvas[1])
    out = Image.new("RGB", canvas)
    corner = ((canvas[0] - inner[0]) // 2, (canvas[1] - inner[1]) // 2)
    out.paste(_resized(image, inner), corner)
    return out


def tiles(image: Image.Image, side: int) -> list[Image.Image]:
    """Squares of an image, row by row."""
    return [
        image.crop((x, y, x + side, y + side))
        for y in range(0, image.height, side)
        for x in range(0, image.width, side)
    ]


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of a colour."""
    side = max(image.size)
    out = Image.new("RGB", (side, side), colour)
    out.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return out


def _resized(image: Image.Image, size: Pair) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
