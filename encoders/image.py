"""Raw images as 8-bit RGB and as normalised pixels, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from encoders.features import Prepared


@dataclass(frozen=True)
class ImageInput:
    """Normalised pixels of one image, resized (bicubic) to a square without keeping its aspect.

    Args:
        size: side in pixels.
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, divides after `mean`.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"ImageInput: mean={self.mean}, std={self.std}; expected three numbers each, "
                "std > 0"
            )

    def __call__(self, item: Any) -> Prepared:
        """Pixels [3 size size] float32 of an image, with its original size.

        Args:
            item: path, PIL image, or [Y X 3] / [3 Y X] / [Y X] array or tensor, uint8 in 0..255
                or float in 0..1. Transparent pixels are shown on white.
        Raises:
            ValueError: not such an image, or values that are not finite or out of range.
        """
        side = self.size
        if isinstance(item, np.ndarray) and item.shape == (side, side, 3) and item.dtype == "uint8":
            pixels, size = torch.from_numpy(np.ascontiguousarray(item)), (side, side)  # [Y X C]
        else:
            image = as_rgb(item)
            size = (image.height, image.width)
            if image.size != (side, side):
                image = image.resize((side, side), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(image))  # [Y X C]
        return Prepared("image", self.normalize(pixels), size)

    def normalize(self, pixels: Tensor) -> Tensor:
        """[... 3 Y X] float32 of uint8 pixels [... Y X 3]."""
        # In units of uint8, so that with 0.5 black and white are exactly -1 and 1.
        middle = torch.tensor([255 * m for m in self.mean], device="cpu")
        spread = torch.tensor([255 * s for s in self.std], device="cpu")
        normalised = pixels.float().sub_(middle).div_(spread)
        return normalised.movedim(-1, -3).contiguous()


def as_rgb(item: Any) -> Image.Image:
    """An image as 8-bit RGB; transparent pixels are shown on white.

    Args:
        item: see `ImageInput`.
    Raises:
        TypeError: not an image.
        ValueError: an image that cannot be read, or whose range is not fixed.
    """
    if isinstance(item, str | Path):
        try:
            with Image.open(item) as image:
                return _flattened(ImageOps.exif_transpose(image))
        except (UnidentifiedImageError, SyntaxError, EOFError) as error:
            raise ValueError(f"{item} is not an image that can be read") from error
    if isinstance(item, Image.Image):
        return _flattened(item)
    if isinstance(item, np.ndarray | Tensor):
        return _flattened(Image.fromarray(to_uint8(item)))
    raise TypeError(
        f"image is a {type(item).__name__}; expected a path, PIL image, array or tensor"
    )


def _flattened(image: Image.Image) -> Image.Image:
    """8-bit RGB of any 8-bit image."""
    if image.mode[0] in "IF":
        raise ValueError(
            f"image mode is {image.mode}, whose range is not fixed; "
            "expected 8 bits per channel, read it with mmdlm.media.read_image"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_uint8(item: np.ndarray | Tensor) -> np.ndarray:
    """[Y X 3] uint8 of an array in either channel order, uint8 in 0..255 or float in 0..1.

    Raises:
        ValueError: another shape, type or range.
    """
    array = item.detach().cpu().numpy() if isinstance(item, Tensor) else item
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)  # [Y X C]
    if array.ndim == 3 and array.shape[2] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)  # [Y X C]
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"image is {list(item.shape)}, expected [Y X 3], [3 Y X] or [Y X] with Y, X > 0"
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f":
        raise ValueError(f"image dtype is {array.dtype}, expected uint8 or float in 0..1")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise ValueError(
            f"float image spans {low:g} to {high:g}, expected 0 to 1; divide by 255 first?"
        )
    return np.ascontiguousarray(np.rint(array * 255).astype(np.uint8))
