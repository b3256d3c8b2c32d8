"""Reading audio: every form, and every bad input with its error."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from mmdlm.media import read_audio


def tone(seconds: float = 0.5, rate: int = 16000, level: float = 0.5) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_audio_files_are_read_as_recorded(tmp_path, extension):
    path, sound = tmp_path / f"x.{extension}", tone(1.0, 22050)
    soundfile.write(path, sound, 22050)
    for form in (path, str(path), path.read_bytes()):
        samples, rate = read_audio(form)
        assert (rate, samples.dtype, samples.shape) == (22050, np.float32, sound.shape)
        assert np.abs(samples - sound).max() < (0.05 if extension in ("ogg", "mp3") else 1e-4)


def test_channels_are_averaged(tmp_path):
    both = np.stack([tone(), 0.5 * tone()], axis=1)
    soundfile.write(tmp_path / "x.wav", both, 16000, subtype="FLOAT")
    for form in (tmp_path / "x.wav", (both, 16000), (both.T, 16000), (torch.tensor(both), 16000)):
        np.testing.assert_allclose(read_audio(form)[0], 0.75 * tone(), atol=1e-6)
    six = np.repeat(tone()[:, None], 6, axis=1)
    np.testing.assert_allclose(read_audio((six, 16000))[0], tone(), atol=1e-6)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([-32768, 0, 16384], np.int16), [-1, 0, 0.5]),
        (np.array([-(2**31), 0, 2**30], np.int32), [-1, 0, 0.5]),
        (np.array([0, 128, 192], np.uint8), [-1, 0, 0.5]),
        (np.array([-1, 0, 0.5], np.float16), [-1, 0, 0.5]),
        ([-1.0, 0.0, 0.5], [-1, 0, 0.5]),
        ([-1.2, 0.0, 1.1], [-1, 0, 1]),
    ],
)
def test_every_dtype_is_scaled_to_one(samples, expected):
    out, rate = read_audio((samples, np.int64(8000)))
    assert out.dtype == np.float32
    assert out.tolist() == expected
    assert type(rate) is int


@pytest.mark.parametrize("rate", [8000, 11025, 44056, 96000])
def test_unusual_rates_are_kept(rate):
    assert read_audio((tone(), rate))[1] == rate


@pytest.mark.parametrize("rate", [0, -16000, 16000.5, float("nan"), 10, 10**7])
def test_invalid_rates_are_rejected(rate):
    with pytest.raises(ValueError, match="expected a whole number from 1000 to 768000"):
        read_audio((tone(), rate))


def test_swapped_or_untyped_rate_is_rejected():
    with pytest.raises(TypeError, match=r"\(samples, rate\) in this order"):
        read_audio((16000, tone()))
    with pytest.raises(TypeError, match="is a str, expected Hz"):
        read_audio((tone(), "16000"))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros((2, 2, 2), np.float32), r"shape \[2, 2, 2\]"),
        (np.zeros((80, 300), np.float32), "at most 64 channels"),
        (
            np.array([0.1, np.nan, np.inf]),
            "2 of 3 values are NaN or infinite, the first at sample 1",
        ),
        (np.array([0.0, 20000.0]), "peak at 20000"),
        (np.array([1, 2], np.int64), "is int64"),
        (np.array([1 + 1j]), "is complex128"),
    ],
)
def test_invalid_samples_are_rejected(samples, message):
    with pytest.raises(ValueError, match=message):
        read_audio((samples, 16000))


def test_empty_and_other_files_are_rejected_as_audio(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(ValueError, match=r"empty\.wav: no samples"):
        read_audio(tmp_path / "empty.wav")
    (tmp_path / "zero.wav").touch()
    with pytest.raises(ValueError, match="0 bytes"):
        read_audio(tmp_path / "zero.wav")
    (tmp_path / "x.wav").write_bytes(b"this is text, not audio, and long enough")
    with pytest.raises(ValueError, match="tried soundfile: .*; av: "):
        read_audio(tmp_path / "x.wav")
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match="100 of 100 values"):
        read_audio(tmp_path / "nan.wav")


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_truncated_audio_file_is_rejected(tmp_path, extension):
    path = tmp_path / f"x.{extension}"
    soundfile.write(path, tone(2), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"x.{extension}"):
        read_audio(path)


def test_wav_of_unknown_length_is_read(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, tone(), 16000)
    data = bytearray(path.read_bytes())
    data[4:8] = b"\xff\xff\xff\xff"
    assert len(read_audio(bytes(data))[0]) == 8000


def test_silence_is_read_with_a_warning(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(800), 16000)
    with pytest.warns(UserWarning, match="silent"):
        samples, _ = read_audio(tmp_path / "x.wav")
    assert not samples.any()


def test_10_ms_of_audio_are_read():
    assert len(read_audio((tone(0.01), 16000))[0]) == 160


def test_too_long_audio_is_rejected_before_decoding(tmp_path):
    soundfile.write(tmp_path / "x.flac", tone(3), 16000)
    with pytest.raises(ValueError, match="lasts 3 s, more than max_seconds=2"):
        read_audio(tmp_path / "x.flac", max_seconds=2)
    with pytest.raises(ValueError, match="lasts 3 s, more than max_seconds=2.5"):
        read_audio((tone(3), 16000), max_seconds=2.5)
    assert len(read_audio(tmp_path / "x.flac", max_seconds=3)[0]) == 48000
    hours = np.broadcast_to(np.float32(0.1), 2 * 3600 * 1000)
    with pytest.raises(ValueError, match="lasts 7200 s, more than max_seconds=1800"):
        read_audio((hours, 1000))
    assert len(read_audio((hours, 1000), max_seconds=None)[0]) == 7_200_000
