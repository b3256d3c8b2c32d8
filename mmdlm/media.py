"""Reads images and audio from files and arrays; invalid input raises one clear error."""

from __future__ import annotations

import difflib
import io
import os
import struct
import warnings
import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

# fmt: off
IMAGE_EXTENSIONS = frozenset((
    ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff",
    ".webp",
))
AUDIO_EXTENSIONS = frozenset((
    ".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wma",
))
# fmt: on
# Pillow's limit, 256 MB as RGB: protects against decompression bombs.
MAX_PIXELS = 89_478_485
SOURCES = (str, Path, bytes, bytearray, memoryview)
EXIF_ORIENTATION = 0x0112
RATES = (1_000, 768_000)  # Hz
MAX_CHANNELS = 64


class _UnreadableError(Exception):
    """An audio reader cannot read the file; the next one is tried."""


def media_kind(path: str | Path) -> Literal["image", "audio"] | None:
    """The modality of a file name by its extension, or None."""
    extension = Path(path).suffix.lower()
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return "audio" if extension in AUDIO_EXTENSIONS else None


def find_media(
    paths: str | Path | Iterable[str | Path], kind: Literal["image", "audio"]
) -> list[Path]:
    """Lists the files of one kind in `paths`, without duplicates, in the given order.

    Args:
        paths: files and folders. Folders are searched recursively in sorted order; hidden files,
            hidden folders and linked folders are skipped.
        kind: the kind to list.
    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file has an extension of the other kind, or a folder has no file of this kind.
    """
    if kind not in ("image", "audio"):
        raise ValueError(f"find_media: kind={kind!r}, expected 'image' or 'audio'")
    found: dict[Path, None] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if path.is_dir():
            inside = _walk(path, kind)
            if not inside:
                known = " ".join(sorted(IMAGE_EXTENSIONS if kind == "image" else AUDIO_EXTENSIONS))
                raise ValueError(
                    f"find_media: no {kind} in folder {path}; expected a file with {known}"
                )
            found.update(dict.fromkeys(inside))
            continue
        _check_exists(path)
        if media_kind(path) not in (kind, None):
            raise ValueError(f"find_media: {path} is {media_kind(path)}, expected {kind}")
        found[path] = None
    return list(found)


def _walk(folder: Path, kind: str) -> list[Path]:
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen = (name for name in names if not name.startswith("."))
        files += [Path(root, name) for name in seen if media_kind(name) == kind]
    return sorted(files)


def _check_exists(path: Path) -> None:
    if path.exists():
        return
    if str(path).startswith(("http:", "https:")):
        raise FileNotFoundError(f"{path} is a URL, expected a local file; download it first")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such file: {path}; its folder does not exist either")
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=3)
    raise FileNotFoundError(
        f"no such file: {path}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def _open(source: str | Path | bytes | bytearray | memoryview, what: str) -> tuple[BinaryIO, str]:
    """An open binary file and its name for errors."""
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) == 0:
            raise ValueError(f"{what}: the bytes are empty")
        return io.BytesIO(source), f"the {len(source)} bytes"
    path = Path(source)
    _check_exists(path)
    if path.is_dir():
        raise ValueError(f"{what}: {path} is a folder; list its files with find_media")
    if path.stat().st_size == 0:
        raise ValueError(f"{what}: {path} is empty (0 bytes)")
    return path.open("rb"), str(path)


def read_image(item: Any) -> Image.Image:
    """Reads an image as 8-bit RGB with its EXIF orientation applied.

    Transparency is composited on white, 16 bits are scaled to 8, and CMYK, palette and grey are
    converted. The first frame of an animation is used, with a warning.

    Args:
        item: path, file bytes, PIL image, or an array or tensor [Y X], [Y X 1|3|4] or
            [1|3|4 Y X]: uint8, uint16 over their whole range, or float in 0..1.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, damaged, truncated, larger than 89 megapixels, or values that are
            not finite or out of range.
        TypeError: unsupported type of item.
    """
    if isinstance(item, np.ndarray | Tensor):
        return _rgb(_array_image(item), "the array")
    if isinstance(item, Image.Image):
        return _decoded(item, "the PIL image")
    if not isinstance(item, SOURCES):
        raise TypeError(
            f"read_image: item is a {type(item).__name__}; "
            "expected a path, bytes, PIL image, array or tensor"
        )
    file, name = _open(item, "read_image")
    with file:
        try:
            image = Image.open(file)
        except Image.DecompressionBombError as error:
            raise ValueError(f"read_image: {name} is too large: {error}") from error
        except Exception as error:  # decoders raise many types for damaged files
            raise ValueError(f"read_image: {name} is not a readable image ({error})") from error
        return _decoded(image, name)


def _decoded(image: Image.Image, name: str) -> Image.Image:
    """Decodes the pixels of an opened image."""
    columns, rows = image.size
    if columns * rows > MAX_PIXELS:
        size = f"{columns}x{rows}, more than {MAX_PIXELS} pixels"
        raise ValueError(f"read_image: {name} is {size}; resize it first")
    if columns * rows == 0:
        raise ValueError(f"read_image: {name} is {columns}x{rows}, expected at least one pixel")
    try:
        # The frames of an MPO file (phones) are not an animation.
        frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
        image.load()
        if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # as above
        raise ValueError(f"read_image: {name} is damaged or truncated ({error})") from error
    if frames > 1:
        warnings.warn(f"{name} has {frames} frames; only the first is read", stacklevel=3)
    return _rgb(image, name)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB."""
    if image.mode.startswith(("I", "F")):
        array = np.asarray(image)
        low, high = float(array.min()), float(array.max())
        top = 1 if image.mode == "F" else 65535
        if not (low >= 0 and high <= top):  # also rejects NaN
            raise ValueError(
                f"read_image: {name} spans {low:g} to {high:g}, expected 0 to {top} in mode "
                f"{image.mode}; scale it first"
            )
        image = Image.fromarray(np.rint(array * (255 / top)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _array_image(item: np.ndarray | Tensor) -> Image.Image:
    """8-bit grey, RGB or RGBA image of an array, channels first or last."""
    array = item.detach().cpu().numpy() if isinstance(item, Tensor) else item
    if array.ndim == 2:
        array = array[:, :, None]  # [Y X C]
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # [Y X C]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"read_image: array is {list(item.shape)}, expected [Y X], [Y X 1|3|4] or [1|3|4 Y X] "
            "with Y, X > 0"
        )
    if array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)
    elif array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"read_image: float array spans {low:g} to {high:g}, expected 0 to 1; "
                "divide by 255?"
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"read_image: array dtype is {array.dtype}, expected uint8, uint16 or float in 0..1"
        )
    array = array[:, :, 0] if array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(array))


def read_audio(item: Any, max_seconds: float | None = 1800) -> tuple[np.ndarray, int]:
    """Reads audio as mono samples at the recorded rate.

    Channels are averaged, integers are scaled by their range, and peaks slightly above 1 (lossy
    decoders) are clipped. Silence gives a warning. Truncated files raise, except Ogg, of which the
    remaining part is returned.

    Args:
        item: path, file bytes, or (samples, rate); samples [T], [T C] or [C T] (the shorter axis
            is the channels), float in [-1, 1], int16, int32 or uint8; rate in Hz.
        max_seconds: longest accepted duration in seconds; None: no limit.
    Returns:
        [T] float32 in [-1, 1], and the rate in Hz.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not audio, damaged, truncated, empty, too long, not finite, out of range, or an
            invalid rate.
        TypeError: unsupported type of item.
    """
    if isinstance(item, tuple):
        if len(item) != 2 or isinstance(item[0], int | float):
            raise TypeError("read_audio: item is a tuple, expected (samples, rate) in this order")
        samples, rate, name = *item, "the samples"
        samples = samples.detach().cpu() if isinstance(samples, Tensor) else samples
        samples = np.asarray(samples)
        if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
            samples = samples.T  # [T C]
    elif isinstance(item, SOURCES):
        file, name = _open(item, "read_audio")
        with file:
            _check_complete(file, name)
            samples, rate = _read_file(file, name, max_seconds)
    else:
        kind = type(item).__name__
        raise TypeError(f"read_audio: item is a {kind}; expected a path, bytes or (samples, rate)")
    rate = _checked_rate(rate, name)
    if samples.size == 0:
        raise ValueError(f"read_audio: {name}: no samples")
    if samples.ndim not in (1, 2) or samples.shape[1:] > (MAX_CHANNELS,):
        raise ValueError(
            f"read_audio: {name}: shape {list(samples.shape)}, expected [T], [T C] or [C T] with "
            f"at most {MAX_CHANNELS} channels"
        )
    _check_length(len(samples) / rate, max_seconds, name)
    return _mono(samples, name), rate


def _checked_rate(rate: Any, name: str) -> int:
    number = rate.item() if isinstance(rate, np.generic | Tensor) else rate
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"read_audio: rate of {name} is a {type(rate).__name__}, expected Hz")
    if number != number or number % 1 or not RATES[0] <= number <= RATES[1]:
        raise ValueError(
            f"read_audio: rate of {name} is {number} Hz, "
            f"expected a whole number from {RATES[0]} to {RATES[1]}"
        )
    return int(number)


def _check_length(seconds: float, max_seconds: float | None, name: str) -> None:
    if max_seconds is not None and seconds > max_seconds:
        raise ValueError(
            f"read_audio: {name} lasts {seconds:.6g} s, more than max_seconds={max_seconds:g}; "
            "shorten it, or pass a larger max_seconds"
        )


def _mono(samples: np.ndarray, name: str) -> np.ndarray:
    """Converts samples [T] or [T C] of any supported dtype to mono float32 [T] in [-1, 1]."""
    scales = {"int16": 2.0**-15, "int32": 2.0**-31, "uint8": 2.0**-7}
    if samples.dtype.kind == "f":
        samples = samples.astype(np.float32)
    elif samples.dtype.name in scales:
        middle = 128 if samples.dtype == np.uint8 else 0
        samples = ((samples - np.float64(middle)) * scales[samples.dtype.name]).astype(np.float32)
    else:
        raise ValueError(
            f"read_audio: dtype of {name} is {samples.dtype}, "
            "expected float in [-1, 1], int16, int32 or uint8"
        )
    bad = np.argwhere(~np.isfinite(samples))
    if len(bad):
        raise ValueError(
            f"read_audio: {name}: {len(bad)} of {samples.size} values are NaN or infinite, "
            f"the first at sample {bad[0][0]}"
        )
    peak = float(np.abs(samples).max())
    if peak > 2:
        raise ValueError(
            f"read_audio: {name} peak at {peak:g}, expected values in [-1, 1]; "
            "divide int16 values by 32768"
        )
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)  # [T]
    if np.abs(mono).max() < 1e-4:
        warnings.warn(f"{name}: silent, no sample above -80 dB", stacklevel=3)
    return np.clip(mono, -1, 1)


def _check_complete(file: BinaryIO, name: str) -> None:
    """Rejects a WAV or AIFF file shorter than its header states; readers do not report it."""
    head = file.read(12)
    size = file.seek(0, io.SEEK_END)
    order = {b"RIFF": "<I", b"FORM": ">I"}.get(head[:4])
    if order is None or head[8:] not in (b"WAVE", b"AIFF", b"AIFC"):
        return
    stated = struct.unpack(order, head[4:8])[0] + 8
    # Files written to a pipe state 0 or the largest number as their length.
    if size < stated < 2**31:
        raise ValueError(
            f"read_audio: {name}: truncated, {size} of the {stated} bytes of its header"
        )


def _read_file(file: BinaryIO, name: str, limit: float | None) -> tuple[np.ndarray, int]:
    """Samples [T C] and rate, from the first reader that supports the file."""
    tried = []
    for reader in (_by_soundfile, _by_torchcodec, _by_wave):
        file.seek(0)
        try:
            return reader(file, name, limit)
        except _UnreadableError as error:
            tried.append(f"{reader.__name__.removeprefix('_by_')}: {error}")
    raise ValueError(
        f"read_audio: {name} is not readable audio; tried {'; '.join(tried)}. "
        "Convert it to WAV or FLAC"
    )


def _by_soundfile(file: BinaryIO, name: str, limit: float | None) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the C library is missing
        raise _UnreadableError("not installed (pip install soundfile)") from error
    try:
        with soundfile.SoundFile(file) as sound:
            rate, frames = sound.samplerate, sound.frames
            # Before decoding, which may exceed the memory.
            _check_length(frames / rate, limit, name)
            samples = sound.read(dtype="float32", always_2d=True)  # [T C]
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _UnreadableError(str(error)) from error
    # A stream of unknown length states the largest number; the length of an MP3 is an estimate.
    if len(samples) < frames * (0.9 if sound.format == "MP3" else 1) and frames < 2**62:
        raise ValueError(f"read_audio: {name}: truncated, {len(samples)} of {frames} frames")
    return samples, rate


def _by_torchcodec(file: BinaryIO, name: str, limit: float | None) -> tuple[np.ndarray, int]:
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, OSError, RuntimeError) as error:  # the last two: no FFmpeg libraries
        raise _UnreadableError("not installed (pip install torchcodec, and FFmpeg)") from error
    try:
        decoder = AudioDecoder(file.read())
        seconds = decoder.metadata.duration_seconds or 0
        sound = None if limit is not None and seconds > limit else decoder.get_all_samples()
    except (RuntimeError, ValueError) as error:
        raise _UnreadableError(str(error)) from error
    _check_length(seconds, limit, name)
    return sound.data.float().numpy().T, sound.sample_rate  # [T C]


def _by_wave(file: BinaryIO, name: str, limit: float | None) -> tuple[np.ndarray, int]:
    try:
        with wave.open(file) as sound:
            rate, channels, width = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
            _check_length(sound.getnframes() / max(rate, 1), limit, name)
            data = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise _UnreadableError(str(error) or "unexpected end of file") from error
    if width == 3:
        # 24 bits are the upper three bytes of 32.
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = padded.view("<i4")[:, 0]
    else:
        samples = np.frombuffer(data, {1: "u1", 2: "<i2", 4: "<i4"}[width])
    return samples.reshape(-1, channels), rate  # [T C]
