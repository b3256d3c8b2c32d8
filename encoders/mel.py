"""Whisper's audio front end: mono samples at 16 kHz to log-mel frames, 100 per second."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.torchaudio_loader import import_torchaudio

if TYPE_CHECKING:
    from torchaudio.transforms import MelSpectrogram, Resample

RATE = 16_000  # Hz
HOP = 160  # samples per frame
SHORTEST = 0.025  # seconds, one analysis window of 400 samples
LOUDEST = 4.0  # audio decoders overshoot [-1, 1] slightly; larger values are in another unit


def waveform(item: Any, longest: float | None = None) -> Tensor:
    """Mono samples, float32 [T] at 16 kHz on the CPU, from (samples, rate).

    Channels are averaged. Silence is valid.

    Args:
        item: samples [T], [C T] or [T C] (the shorter axis is the channels), float in [-1, 1] or
            int16, with their rate in Hz.
        longest: maximum duration in seconds; None for no limit.

    Raises:
        TypeError: not a pair of samples and rate, or integers other than int16.
        ValueError: empty, too short, too long, not finite, not in [-1, 1], or a rate <= 0.
        ImportError: the clip has to be resampled and torchaudio does not load.
    """
    try:
        samples, rate = item
    except (TypeError, ValueError):
        raise TypeError(
            f"audio is {type(item).__name__}, expected (samples, rate), as returned by "
            "soundfile.read"
        ) from None
    wave = _mono(samples, rate)
    _check_samples(wave, rate, longest)
    if rate == RATE:
        return wave
    # The resampling kernel grows with the terms of the ratio; for 44101 Hz it would take
    # gigabytes. A denominator of at most 1000 changes the rate by 4 parts in 10^6.
    ratio = Fraction(RATE / rate).limit_denominator(1000)
    return _resampler(ratio.denominator, ratio.numerator)(wave)


def _mono(samples: Any, rate: Any) -> Tensor:
    """Mono float32 [T] of samples of any accepted type and number of channels."""
    wave = torch.as_tensor(samples).detach().cpu()
    if wave.dtype == torch.int16:
        wave = wave.float() / 32768
    if not wave.is_floating_point():
        raise TypeError(f"audio is {wave.dtype}, expected float in [-1, 1] or int16")
    if wave.ndim not in (1, 2):
        raise ValueError(f"audio is {list(wave.shape)}, expected [T], [C T] or [T C]")
    if not isinstance(rate, Real):
        raise TypeError(f"audio rate is {type(rate).__name__}, expected a number of Hz")
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"audio rate is {rate}, expected Hz > 0")
    if wave.numel() == 0:
        raise ValueError(f"audio is empty {list(wave.shape)}; skip the clip")
    wave = wave.float()
    if wave.ndim == 2:
        wave = wave.mean(dim=int(wave.shape[0] > wave.shape[1]))  # [T]
    return wave


def _check_samples(wave: Tensor, rate: float, longest: float | None) -> None:
    """Raises ValueError for clips of invalid length or range."""
    seconds = len(wave) / rate
    if seconds < SHORTEST:
        raise ValueError(
            f"audio lasts {seconds * 1000:.1f} ms ({len(wave)} samples at {rate} Hz), expected at "
            f"least {SHORTEST * 1000:.0f} ms; pad it with silence or skip it"
        )
    if longest is not None and seconds > longest:
        raise ValueError(
            f"audio lasts {seconds:.2f} s ({len(wave)} samples at {rate} Hz), the encoder takes at "
            f"most {longest:.2f} s; split the clip into windows and join the answers"
        )
    peak = wave.abs().max().item()  # NaN if any sample is
    if not math.isfinite(peak):
        bad = int((~wave.isfinite()).sum())
        raise ValueError(f"audio has {bad} NaN or infinite samples of {len(wave)}")
    if peak > LOUDEST:
        raise ValueError(
            f"audio reaches {peak:.6g}, expected [-1, 1]; divide 16-bit values by 32768"
        )


@functools.lru_cache(maxsize=8)  # computing a kernel takes longer than resampling a short clip
def _resampler(rate: int, target: int) -> Resample:
    with torch.device("cpu"):
        return import_torchaudio().transforms.Resample(rate, target, dtype=torch.float32)


@functools.cache
def _spectrogram(mels: int) -> MelSpectrogram:
    # Built on first use, so that an encoder constructed on the meta device has real filters.
    with torch.device("cpu"):
        return import_torchaudio().transforms.MelSpectrogram(
            RATE, n_fft=400, hop_length=HOP, n_mels=mels, norm="slaney", mel_scale="slaney"
        )


class LogMel:
    """Whisper's log-mel frames of one clip.

    A plain callable, not a module: its filters stay on the CPU and out of checkpoints.
    Constants: openai/whisper: whisper/audio.py.

    Args:
        mels: bands between 0 and 8000 Hz; 80, or 128 for large-v3.
        seconds: window to which clips are padded with zeros, a whole number of frames; None keeps
            each clip's length.
    Raises:
        ValueError: `seconds` is not a positive whole number of frames.
    """

    def __init__(self, mels: int = 80, seconds: float | None = 30.0) -> None:
        if seconds is not None and (round(seconds * RATE) < HOP or round(seconds * RATE) % HOP):
            raise ValueError(f"LogMel: seconds is {seconds}, expected a positive multiple of 0.01")
        self.mels = mels
        self.samples = None if seconds is None else round(seconds * RATE)

    def __call__(self, wave: Tensor) -> Tensor:
        """Frames, float32 [mels T], at most 2 below their maximum.

        Args:
            wave: [T] float32 at 16 kHz; without a window it is padded to whole frames.

        Raises:
            ValueError: the clip is longer than the window, or too short for one analysis window.
            ImportError: torchaudio does not load.
        """
        target = self.samples or math.ceil(len(wave) / HOP) * HOP
        if target < SHORTEST * RATE:
            raise ValueError(f"LogMel: clip has {len(wave)} samples, expected at least 400")
        if len(wave) > target:
            raise ValueError(f"LogMel: clip has {len(wave)} samples, the window holds {target}")
        power = _spectrogram(self.mels)(F.pad(wave, (0, target - len(wave))))[:, :-1]  # [mels T]
        frames = power.clamp(min=1e-10).log10()
        return (frames.clamp(min=frames.max() - 8) + 4) / 4
