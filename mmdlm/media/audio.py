"""Audio from files and arrays as mono samples."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
from torch import Tensor

from mmdlm.media.files import SOURCES, OnDamage, open_media

RATES = (1_000, 768_000)  # Hz
MAX_CHANNELS = 64


def read_audio(
    item: Any, max_seconds: float | None = 1800, on_damage: OnDamage = "error"
) -> tuple[np.ndarray, int]:
    """Reads audio as mono samples at the recorded rate.

    Channels are averaged, integers are scaled by their range, and peaks slightly above 1 (lossy
    decoders) are clipped. Silence gives a warning. Where the header of a file and its length
    disagree, the length decides. Of a video its sound is read.

    Args:
        item: path, file bytes, or (samples, rate); samples [T], [T C] or [C T] (the shorter axis
            is the channels), float in [-1, 1], int16, int32 or uint8; rate in Hz.
        max_seconds: longest accepted duration in seconds; None: no limit.
        on_damage: "error", or "warn": of a damaged or truncated file the readable part is
            returned with a warning.
    Returns:
        [T] float32 in [-1, 1], and the rate in Hz.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not audio, damaged, truncated, empty, too long, not finite, out of range, an
            invalid rate, or the library of its format is missing.
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
        from mmdlm.media.decoders import read_file

        file, name = open_media(item, "read_audio", on_damage)
        too_long = functools.partial(_check_length, max_seconds=max_seconds, name=name)
        with file:
            samples, rate = read_file(file, name, too_long, on_damage)
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
    """Raises ValueError for audio longer than `max_seconds`."""
    if max_seconds is not None and seconds > max_seconds:
        raise ValueError(
            f"read_audio: {name} lasts {seconds:.6g} s, more than max_seconds={max_seconds:g}; "
            "shorten it, or pass a larger max_seconds"
        )


def _mono(samples: np.ndarray, name: str) -> np.ndarray:
    """Converts samples [T] or [T C] of any supported dtype to mono float32 [T] in [-1, 1]."""
    scales = {"int16": 2.0**-15, "int32": 2.0**-31, "uint8": 2.0**-7}
    if samples.dtype.kind == "f":
        samples = samples.astype(np.float32, copy=False)
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
