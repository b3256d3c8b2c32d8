"""Raw images as 8-bit RGB and as normalised pixels, without weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoders.checks import Checked, Deviation, Mean, Side
from encoders.features import Prepared


@dataclass(frozen=True)
class ImageInput(Checked):
    """Normalised pixels of one image, resized (bicubic) to a square without keeping its aspect.

    Args:
        size: side in pixels.
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, divides after `mean`.
    """

    size: Side
    mean: tuple[Mean, Mean, Mean] = (0.5, 0.5, 0.5)
    std: tuple[Deviation, Deviation, Deviation] = (0.5, 0.5, 0.5)

    def __call__(self, item: Any) -> Prepared:
        """Pixels [3 size size] float32 of an image, with its original size.

        Args:
            item: PIL image, array or tensor, see `as_rgb`.
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


def as_rgb(item: Any, name: str = "image") -> Image.Image:
    """An image as 8-bit RGB; transparent pixels are shown on white.

    Other ranges than 8 bits are scaled. 16 bits of which only the lowest 8, 10, 12 or 14 are used
    are scaled by these, and 32-bit integers or floats outside their usual range (0 to 65535, 0 to
    1) from their smallest to their largest value; both give a warning.

    Args:
        item: PIL image, or array or tensor [Y X], [Y X 1|3|4] or [1|3|4 Y X]: uint8, uint16, or
            float in 0..1.
        name: what errors and warnings call it.
    Raises:
        TypeError: not an image.
        ValueError: another shape or type, or values that are not finite or out of range.
    """
    if isinstance(item, np.ndarray | Tensor):
        image = Image.fromarray(to_uint8(item, name))
    elif not isinstance(item, Image.Image):
        raise TypeError(
            f"{name} is a {type(item).__name__}; expected a PIL image, array or tensor; read "
            "files with mmdlm.media.read_image"
        )
    elif item.mode[0] in "IF":
        image = Image.fromarray(_scaled(np.asarray(item), name))
    else:
        image = item
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_uint8(item: np.ndarray | Tensor, name: str = "image") -> np.ndarray:
    """[Y X], [Y X 3] or [Y X 4] uint8 of an array, see `as_rgb`.

    Raises:
        ValueError: another shape, type or range.
    """
    array = item.detach().cpu().numpy() if isinstance(item, Tensor) else item
    if array.ndim == 2:
        array = array[:, :, None]  # [Y X C]
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # [Y X C]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"{name} is {list(item.shape)}, expected [Y X], [Y X 1|3|4] or [1|3|4 Y X] "
            "with Y, X > 0"
        )
    if (array.dtype.kind, array.dtype.itemsize) == ("u", 2):  # of either byte order
        colours = _scaled(array[:, :, :3], name)
        array = np.concatenate([colours, (array[:, :, 3:] >> 8).astype(np.uint8)], axis=2)
    elif array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # written so that NaN fails too
            raise ValueError(
                f"{name} is a float array that spans {low:g} to {high:g}, expected 0 to 1; "
                "divide by 255?"
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{name}: dtype is {array.dtype}, expected uint8, uint16 or float in 0..1")
    return np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _scaled(array: np.ndarray, name: str) -> np.ndarray:
    """Numbers of more than 8 bits as uint8, scaled by their range."""
    low, high = float(array.min()), float(array.max())
    usual = 1.0 if array.dtype.kind == "f" else 65535.0
    bottom, top = 0.0, usual
    if not 0 <= low <= high <= usual:
        if not low < high < np.inf or low == -np.inf:  # NaN, infinite or constant
            raise ValueError(
                f"{name} spans {low:g} to {high:g}, expected 0 to {usual:g}; scale it first"
            )
        bottom, top = low, high
    elif high > 0 and array.dtype.kind != "f":
        top = next(2.0**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits)
    if (bottom, top) != (0.0, usual):
        warnings.warn(
            f"{name} spans {low:g} to {high:g}, not 0 to {usual:g}; {bottom:g} to {top:g} is shown "
            "as black to white",
            stacklevel=4,
        )
    return np.rint((array - bottom) * (255 / (top - bottom))).astype(np.uint8)
