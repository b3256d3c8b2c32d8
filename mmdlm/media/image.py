"""Images from files and arrays as 8-bit RGB."""

from __future__ import annotations

import functools
import io
import warnings
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from encoders.image import as_rgb
from mmdlm.media.files import (
    SOURCES,
    OnDamage,
    open_media,
    report_damage,
    require_av,
)
from mmdlm.media.image_parts import JPEG, PNG, check_png, without_metadata

# Pillow's limit, 256 MB as RGB: protects against decompression bombs.
MAX_PIXELS = 89_478_485
# No image of MAX_PIXELS needs more; larger files are not read into memory.
MAX_BYTES = 2**30
EXIF_ORIENTATION, BITS_PER_SAMPLE = 0x0112, 258
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(item: Any, on_damage: OnDamage = "error") -> Image.Image:
    """Reads an image as 8-bit RGB with its EXIF orientation applied.

    Transparency is composited on white, CMYK, palette and grey are converted, and more than 8 bits
    are scaled to 8, see `encoders.image.as_rgb`. The first frame of an animation is used, with a
    warning. Colour profiles are not applied. Damaged metadata are ignored with a warning.

    Args:
        item: path, file bytes, PIL image, or an array or tensor [Y X], [Y X 1|3|4] or
            [1|3|4 Y X]: uint8, uint16, or float in 0..1.
        on_damage: "error", or "warn": of a damaged or truncated file the readable part is
            returned with a warning; the rest is black or grey.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, damaged, truncated, larger than 89 megapixels, values that are
            not finite or out of range, or the library of its format is missing.
        TypeError: unsupported type of item.
    """
    if isinstance(item, np.ndarray | Tensor):
        return as_rgb(item, "read_image: array")
    if isinstance(item, Image.Image):
        return _finished(item, "the PIL image", on_damage)
    if not isinstance(item, SOURCES):
        raise TypeError(
            f"read_image: item is a {type(item).__name__}; "
            "expected a path, bytes, PIL image, array or tensor"
        )
    file, name = open_media(item, "read_image", on_damage)
    with file:
        return _read_file(file, name, on_damage)


def _read_file(file: BinaryIO, name: str, on_damage: OnDamage) -> Image.Image:
    """The image of a file as 8-bit RGB."""
    head = file.read(16)
    _require_decoder(head, name)
    data = _in_memory(file, name) if head.startswith((PNG, JPEG, b"RIFF")) else None
    if head.startswith(PNG):
        data, damage, removed = check_png(data)
        report_damage(damage, on_damage, "read_image", name)
        if removed:
            warnings.warn(f"{name}: damaged metadata ({removed}) are ignored", stacklevel=4)
    try:
        return _decoded(file if data is None else io.BytesIO(data), name, on_damage)
    except ValueError as error:
        bare = None if data is None else without_metadata(data)
        if bare is None:
            raise
        try:
            image = _decoded(io.BytesIO(bare), name, "error")
        except ValueError:
            raise error from None
        warnings.warn(f"{name}: damaged metadata are ignored ({error.__cause__})", stacklevel=4)
        return image


def _in_memory(file: BinaryIO, name: str) -> bytes:
    size = file.seek(0, io.SEEK_END)
    if size > MAX_BYTES:
        raise ValueError(f"read_image: {name} is too large: {size} bytes, at most {MAX_BYTES}")
    file.seek(0)
    return file.read()


def _require_decoder(head: bytes, name: str) -> None:
    """Registers the decoder of HEIC, and names the missing library of HEIC or AVIF."""
    if head[4:8] != b"ftyp":
        return
    if head[8:12] in HEIF_BRANDS and not _register_heif():
        raise ValueError(
            f'read_image: {name} is HEIC, which needs the extra: pip install "mmdlm[data]"'
        )
    if head[8:12] in (b"avif", b"avis") and not features.check("avif"):
        raise ValueError(
            f'read_image: {name} is AVIF, which needs pip install "pillow>=11.3" '
            "(a build with libavif)"
        )


@functools.cache
def _register_heif() -> bool:
    try:
        from pillow_heif import register_heif_opener
    except (ImportError, OSError):  # OSError: the C library is missing
        return False
    register_heif_opener()
    return True


def _decoded(file: BinaryIO, name: str, on_damage: OnDamage) -> Image.Image:
    """The image of an open file of any format as 8-bit RGB."""
    file.seek(0)
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"read_image: {name} is too large: {error}") from error
    except Exception as error:  # decoders raise many types for damaged files
        raise ValueError(f"read_image: {name} is not a readable image ({error})") from error
    return _finished(image, name, on_damage, file)


def _finished(
    image: Image.Image, name: str, on_damage: OnDamage, file: BinaryIO | None = None
) -> Image.Image:
    """Decodes the pixels of an opened image to 8-bit RGB and turns it upright."""
    columns, rows = image.size
    if columns * rows > MAX_PIXELS:
        size = f"{columns}x{rows}, more than {MAX_PIXELS} pixels"
        raise ValueError(f"read_image: {name} is {size}; resize it first")
    if columns * rows == 0:
        raise ValueError(f"read_image: {name} is {columns}x{rows}, expected at least one pixel")
    frames = 1
    if image.format != "MPO":  # its frames (phones) are not an animation
        with suppress(Exception):  # a damaged later frame does not concern the first
            frames = getattr(image, "n_frames", 1)
    # Pillow turns a TIFF image while it loads it.
    stored = _orientation(image, name) if image.format == "TIFF" else None
    try:
        image.load()
    except Exception as error:  # as above
        damage = str(error) or type(error).__name__
        if on_damage == "warn" and not _has_pixels(image):
            damage += ", none of its pixels are readable"
            on_damage = "error"
        report_damage(damage, on_damage, "read_image", name, error)
    if frames > 1:
        warnings.warn(f"{name} has {frames} frames; only the first is read", stacklevel=5)
    try:
        deep = _deep(image, file, name) if file is not None and _is_reduced(image, file) else None
    except (RuntimeError, OSError, StopIteration) as error:  # only of damaged files
        report_damage(f"its 16-bit colours: {error}", on_damage, "read_image", name, error)
        deep = None
    try:
        rgb = as_rgb(image if deep is None else deep, f"read_image: {name}")
    except (AssertionError, IndexError) as error:  # an incomplete palette
        raise ValueError(f"read_image: {name} is damaged: its palette is incomplete") from error
    is_stored = deep is not None and stored is not None
    method = UPRIGHT.get(stored if is_stored else _orientation(image, name))
    return rgb if method is None else rgb.transpose(method)


def _has_pixels(image: Image.Image) -> bool:
    """Whether pixels were decoded before an error; they become the image."""
    image.tile = []  # nothing is left to decode
    try:
        image.load()
        return image.getbbox() is not None
    except Exception:  # noqa: BLE001 - as above
        return False


def _orientation(image: Image.Image, name: str) -> int:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception as error:  # as above
        warnings.warn(
            f"{name}: EXIF data are damaged and ignored ({error}); the image may be rotated",
            stacklevel=6,
        )
        return 1


def _is_reduced(image: Image.Image, file: BinaryIO) -> bool:
    """Whether Pillow reduced 16 bits per colour to 8 and little is left.

    It drops the lower byte of each colour. If the values use 14 bits or fewer, that byte counts.
    """
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    if image.format == "PNG":
        file.seek(24)
        bits = file.read(1)[0]
    elif image.format == "TIFF":
        bits = max(image.tag_v2.get(BITS_PER_SAMPLE, (8,)))
    else:
        return False
    colours = image.getextrema()[: 1 if image.mode == "LA" else 3]
    return bits == 16 and max(high for _, high in colours) < 64


def _deep(image: Image.Image, file: BinaryIO, name: str) -> np.ndarray:
    """uint16 [Y X 1|3|4] of a PNG or TIFF file that Pillow reads with 8 bits per colour."""
    file.seek(0)
    if image.format == "PNG":
        from torchvision.io import decode_png

        array = decode_png(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8))
        array = array.permute(1, 2, 0).numpy()  # [Y X C]
    else:
        with require_av(f"read_image: {name} has 16 bits per colour, which").open(file) as frames:
            frame = next(frames.decode(video=0))
            array = frame.to_ndarray(format="rgba64le" if image.mode == "RGBA" else "rgb48le")
    if array.shape[2] == 2:  # grey and alpha
        array = array[:, :, [0, 0, 0, 1]]
    return array
