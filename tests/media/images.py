"""Image files of many formats and modes, made in memory for the tests of this folder."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

ROWS, COLUMNS = 48, 64
GRADIENT = np.linspace(0, 255, ROWS * COLUMNS).reshape(ROWS, COLUMNS)
# Smooth, so that lossy formats stay close, and different in each corner.
RGB = np.stack([GRADIENT, GRADIENT[::-1], GRADIENT[:, ::-1] * 0.5 + 60], axis=2).astype(np.uint8)
GREY = RGB[:, :, 0]
ALPHA = np.where(GRADIENT < 128, 255, 51).astype(np.uint8)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """A file written by Pillow."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """One chunk of a PNG file."""
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(array: np.ndarray, *, first: bytes = b"", last: bytes = b"", parts: int = 3) -> bytes:
    """A PNG file of 8 or 16 bits with given chunks before and after its pixels."""
    channels = 1 if array.ndim == 2 else array.shape[2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    depth = 8 * array.dtype.itemsize
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], depth, colour, 0, 0, 0)
    rows = array.astype(f">u{array.dtype.itemsize}")
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    step = -(-len(body) // parts)
    pixels = [png_chunk(b"IDAT", body[i : i + step]) for i in range(0, len(body), step)]
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + first
    return start + b"".join(pixels) + last + png_chunk(b"IEND", b"")


def on_white(array: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours composited on white."""
    share = (alpha / 255.0)[:, :, None]
    return np.rint(array * share + 255 * (1 - share))


def grey(array: np.ndarray) -> np.ndarray:
    """A grey image as RGB."""
    return np.repeat(array[:, :, None], 3, axis=2)


def whole() -> Iterator[tuple[str, bytes, np.ndarray, float]]:
    """Files of 8 bits, what they show, and the largest difference in a pixel."""
    rgb, alpha = Image.fromarray(RGB), np.dstack([RGB, ALPHA])
    plain = ("PNG", "BMP", "TIFF", "PPM", "TGA", "PCX", "SGI", "QOI", "DIB", "DDS")
    for form in plain:
        yield f"{form} RGB", saved(rgb, form), RGB, 0
    for form in ("PNG", "BMP", "TIFF", "PPM", "TGA", "PCX", "SGI", "GIF", "MSP"):
        if form != "MSP":
            yield f"{form} L", saved(Image.fromarray(GREY), form), grey(GREY), 0
        if form in ("PNG", "BMP", "TIFF", "PPM", "PCX", "MSP", "GIF", "TGA"):
            bits = Image.fromarray(GREY > 127)
            yield f"{form} 1", saved(bits, form), grey(255 * (GREY > 127).astype(np.uint8)), 0
    for form in ("PNG", "TIFF", "TGA", "WEBP", "ICNS", "SGI", "QOI", "DDS"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        if form != "ICNS":
            image = Image.fromarray(alpha)
            yield f"{form} RGBA", saved(image, form, **options), on_white(RGB, ALPHA), 1
    for form in ("PNG", "TIFF", "TGA"):
        image = Image.fromarray(np.dstack([GREY, ALPHA]), "LA")
        yield f"{form} LA", saved(image, form), on_white(grey(GREY), ALPHA), 1
    palette = rgb.quantize(200)
    shown = np.asarray(palette.convert("RGB"))
    for form in ("PNG", "GIF", "TIFF", "BMP", "TGA", "PCX"):
        yield f"{form} P", saved(palette, form), shown, 0
    for colours in (2, 4, 16):
        few = rgb.quantize(colours)
        yield f"PNG P {colours}", saved(few, "PNG"), np.asarray(few.convert("RGB")), 0
    for kind in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "tiff_deflate", "raw"):
        yield f"TIFF {kind}", saved(rgb, "TIFF", compression=kind), RGB, 0
    for quality in (75, 95):
        for sampling in (0, 1, 2):
            file = saved(rgb, "JPEG", quality=quality, subsampling=sampling)
            yield f"JPEG {quality} {sampling}", file, RGB, 16
    yield "JPEG progressive", saved(rgb, "JPEG", progressive=True, quality=95), RGB, 16
    yield "JPEG grey", saved(Image.fromarray(GREY), "JPEG", quality=95), grey(GREY), 8
    yield "JPEG MPO", saved(rgb, "MPO", quality=95, subsampling=0), RGB, 16
    cmyk = rgb.convert("CMYK")
    for form in ("TIFF", "JPEG"):
        options = {} if form == "TIFF" else {"quality": 100, "subsampling": 0}
        yield f"{form} CMYK", saved(cmyk, form, **options), RGB, 16
    yield "JPEG YCbCr", saved(rgb.convert("YCbCr"), "JPEG", quality=100, subsampling=0), RGB, 16
    yield "WEBP lossy", saved(rgb, "WEBP", quality=95), RGB, 24
    yield "WEBP lossless", saved(rgb, "WEBP", lossless=True), RGB, 0
    yield "AVIF", saved(rgb, "AVIF", quality=95), RGB, 24
    yield "AVIF RGBA", saved(Image.fromarray(alpha), "AVIF", quality=95), on_white(RGB, ALPHA), 40
    yield "JPEG2000", saved(rgb, "JPEG2000", irreversible=False), RGB, 0
    yield "JPEG2000 codestream", saved(rgb, "JPEG2000", no_jp2=True), RGB, 0
    yield "ICO", saved(rgb, "ICO", sizes=[(COLUMNS, ROWS)]), RGB, 0
    yield "interlaced GIF", saved(palette, "GIF", interlace=1), shown, 0
    yield "own PNG", png(RGB), RGB, 0
    yield "own PNG in one part", png(RGB, parts=1), RGB, 0
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        turned = as_stored(RGB, number)
        for form in ("PNG", "TIFF", "JPEG", "WEBP"):
            options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
            file = saved(Image.fromarray(turned), form, exif=exif, **options.get(form, {}))
            yield f"{form} orientation {number}", file, RGB, 16 if form == "JPEG" else 0


def as_stored(array: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera stores with this EXIF orientation of a scene that looks like `array`."""
    turned = array[::-1] if orientation in (3, 4, 7, 8) else array
    turned = turned[:, ::-1] if orientation in (2, 3, 6, 7) else turned
    return np.ascontiguousarray(turned.transpose(1, 0, 2) if orientation > 4 else turned)


def deep() -> Iterator[tuple[str, bytes, np.ndarray]]:
    """Files of more than 8 bits that use only a part of their range, and what they show."""
    for bits in (8, 10, 12, 14, 16):
        top = 2**bits - 1
        wide = np.rint(np.stack([GRADIENT, GRADIENT[::-1], GRADIENT[:, ::-1]], 2) * (top / 255))
        wide = wide.astype(np.uint16)
        shown = wide * (255 / top)
        clear = np.full((ROWS, COLUMNS, 1), 65535, np.uint16)
        one = wide[:, :, 0]
        yield f"PNG grey {bits}", png(one), grey(shown[:, :, 0])
        yield f"PNG colour {bits}", png(wide), shown
        yield f"PNG alpha {bits}", png(np.concatenate([wide, clear], 2)), shown
        two = np.concatenate([wide[:, :, :1], clear], 2)
        yield f"PNG grey alpha {bits}", png(two), grey(shown[:, :, 0])
        yield f"TIFF grey {bits}", saved(Image.fromarray(one), "TIFF"), grey(shown[:, :, 0])
        yield f"PGM {bits}", saved(Image.fromarray(one), "PPM"), grey(shown[:, :, 0])
        yield f"JPEG2000 {bits}", saved(Image.fromarray(one), "JPEG2000"), grey(shown[:, :, 0])
    for low, high in ((-1000, 3000), (0, 10**6), (5 * 10**5, 9 * 10**5)):
        numbers = np.rint(low + GRADIENT * ((high - low) / 255))
        shown = grey((numbers - low) * (255 / (high - low)))
        file = saved(Image.fromarray(numbers.astype(np.int32)), "TIFF")
        yield f"TIFF int32 {low} to {high}", file, shown
    for low, high in ((0, 1), (-3, 3), (0, 255), (273.5, 310)):
        numbers = (low + GRADIENT * ((high - low) / 255)).astype(np.float32)
        file = saved(Image.fromarray(numbers), "TIFF")
        yield f"TIFF float {low} to {high}", file, grey(GRADIENT)


def by_opencv(cv2: Any) -> Iterator[tuple[str, bytes, np.ndarray, float]]:
    """Files written by OpenCV, which takes colours in the order blue, green, red."""

    def file(array: np.ndarray, extension: str) -> bytes:
        done, data = cv2.imencode(extension, array[:, :, ::-1] if array.ndim == 3 else array)
        assert done
        return data.tobytes()

    for extension in (".png", ".bmp", ".ppm", ".tiff", ".jpg", ".webp", ".jp2", ".ras", ".sr"):
        loss = {".jpg": 24, ".webp": 24, ".jp2": 8}.get(extension, 0)
        yield extension, file(RGB, extension), RGB, loss
    yield ".pgm", file(GREY, ".pgm"), grey(GREY), 0
    for bits in (10, 12, 14, 16):
        top = 2**bits - 1
        wide = np.rint(RGB * (top / 255)).astype(np.uint16)
        yield f".tiff colour {bits}", file(wide, ".tiff"), RGB, 1.5
        yield f".png colour {bits}", file(wide, ".png"), RGB, 1.5
