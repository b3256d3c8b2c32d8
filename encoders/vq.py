"""Base of image tokenizers: an image as a grid of codes, and the image of a grid of codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoders.checks import Checked, Side
from encoders.features import Features, Prepared
from encoders.image import as_rgb
from encoders.vq_layers import grouped

PATCH, RATIO = 32, 4.0
"""Sides of crops are multiples of `PATCH` pixels, and at most `RATIO` to 1 (Lumina-DiMOO)."""


@dataclass(frozen=True)
class CodeInput(Checked):
    """Pixels of an image at the resolution at which it is tokenized.

    Args:
        size: side in pixels; of "best", the side of a square of the same area.
        crop: "square": the shorter side is resized (bicubic) to `size`, and the centre is cut out;
            "squash": both sides are resized to `size`, which keeps everything (documents, charts);
            "best": the size of the nearest aspect ratio (`crop_sizes`), resized to cover it, and
            the centre cut out.
        low: value of black pixels, white is 1: -1 or 0.
    """

    size: Side
    crop: Literal["square", "squash", "best"] = "square"
    low: float = -1.0

    def __call__(self, item: Any) -> Prepared:
        """Pixels [3 Y X] float32, with the original size.

        Args:
            item: PIL image, array or tensor, see `encoders.image.as_rgb`.
        Raises:
            ValueError: not such an image.
        """
        image = as_rgb(item)
        size = image.height, image.width
        pixels = torch.from_numpy(np.array(self.cropped(image))).movedim(-1, 0)  # [3 Y X]
        return Prepared("image", pixels / 255 * (1 - self.low) + self.low, size)

    def cropped(self, image: Image.Image) -> Image.Image:
        """The image at its tokenized size."""
        side = self.size
        if self.crop == "squash":
            return image.resize((side, side), Image.Resampling.BICUBIC)
        if self.crop == "square":
            short = min(image.size)
            wide, high = (int(side * length / short) for length in image.size)
            resized = image.resize((wide, high), Image.Resampling.BICUBIC)
            return _centre(resized, side, side)
        wide, high = best_size(image.size, crop_sizes((side // PATCH) ** 2))
        while image.width >= 2 * wide and image.height >= 2 * high:
            half = tuple(length // 2 for length in image.size)
            image = image.resize(half, Image.Resampling.BOX)
        scale = max(wide / image.width, high / image.height)
        covering = tuple(round(length * scale) for length in image.size)
        return _centre(image.resize(covering, Image.Resampling.BICUBIC), wide, high)


def _centre(image: Image.Image, wide: int, high: int) -> Image.Image:
    """The middle of an image."""
    left, top = round((image.width - wide) / 2), round((image.height - high) / 2)
    return image.crop((left, top, left + wide, top + high))


def crop_sizes(patches: int) -> list[tuple[int, int]]:
    """Widths and heights in pixels that Lumina-DiMOO knows, of at most this many patches.

    Source: Alpha-VLLM/Lumina-DiMOO: utils/image_utils.py (generate_crop_size_list).
    """
    sizes = []
    wide, high = patches, 1
    while wide > 0:
        if max(wide, high) / min(wide, high) <= RATIO:
            sizes.append((wide * PATCH, high * PATCH))
        if (high + 1) * wide <= patches:
            high += 1
        else:
            wide -= 1
    return sizes


def best_size(size: tuple[int, int], known: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The known width and height of the nearest aspect ratio; of equals the wider one.

    Args:
        size: width and height of an image.
        known: see `crop_sizes`.
    """

    def fit(one: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        across, down = one[0] / size[0], one[1] / size[1]
        return min(across, down) / max(across, down), one

    return max(known, key=fit)


class ImageTokenizer:
    """What encoders that turn pixels into a grid of codes, and back, have in common.

    Attributes:
        count: number of codes.
        stride: pixels per code on each axis.
        low: value of black pixels, white is 1.
    """

    kind: ClassVar[str] = "image"
    float32: ClassVar[bool] = True  # near the bound between two codes, rounding gives the other one
    dim = 1
    count: int
    stride: int
    low: float

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes [B Y/s X/s] int64 of pixels [B 3 Y X]."""
        raise TypeError(f"{type(self).__name__} does not define encode(pixels)")

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B 3 Y X] of codes [B Y/s X/s]; they may pass the range from `low` to 1."""
        raise TypeError(f"{type(self).__name__} does not define decode(codes)")

    def forward(self, items: Sequence[Prepared]) -> Features:
        """Codes as `Features` of width 1 and type int64, row-major."""
        weight = next(self.parameters())
        pixels = [item.tensor.to(weight) for item in items]
        found: dict[int, Tensor] = {}
        for group in grouped([each.shape for each in pixels]):
            codes = self.encode(torch.stack([pixels[i] for i in group]))
            found |= zip(group, codes, strict=True)
        grids = [found[i] for i in range(len(items))]
        sizes = tuple((grid.shape[0], grid.shape[1]) for grid in grids)
        longest = max(grid.numel() for grid in grids)
        tokens = torch.zeros(len(grids), longest, 1, dtype=torch.long, device=weight.device)
        mask = torch.zeros(len(grids), longest, dtype=torch.bool, device=weight.device)
        for i, grid in enumerate(grids):
            tokens[i, : grid.numel(), 0] = grid.flatten()
            mask[i, : grid.numel()] = True
        return Features(tokens, mask, sizes)

    @torch.no_grad()
    def images(self, codes: Tensor) -> list[Image.Image]:
        """RGB images of codes [B Y/s X/s]."""
        pixels = (self.decode(codes).float() - self.low) / (1 - self.low)
        values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)  # [B Y X 3]
        return [Image.fromarray(each) for each in values.cpu().numpy()]
