import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from encoders.mel import LogMel, waveform

GOLDEN = Path(__file__).parents[1] / "golden" / "audio"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "frontend.safetensors")


@pytest.fixture(scope="module")
def clips(golden):
    meta = json.loads((GOLDEN / "frontend_meta.json").read_text())["waves"][1]
    count, rate = meta["samples"], meta["sample_rate"]
    t = np.arange(count) / rate
    on = (t % 0.5) < 0.25
    x = 0.3 * np.sin(2 * np.pi * meta["f0"] * t)
    x += 0.2 * np.sin(2 * np.pi * 3.1 * meta["f0"] * t + 1.0) * on
    x += 0.02 * np.random.default_rng(meta["rng_seed"]).standard_normal(count)
    long = np.clip(np.round(32767 * x), -32768, 32767).astype(np.int16)
    waves = [golden["wave_i16.0"], torch.from_numpy(long)[:480_000], golden["wave_i16.2"]]
    return [wave.float() / 32768 for wave in waves]


@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_equals_the_reference_front_end(golden, clips, mels):
    frames = [LogMel(mels, 30)(clip) for clip in clips]
    assert [list(mel.shape) for mel in frames] == [[mels, 3000]] * 3
    close = {"atol": 1e-4, "rtol": 0}
    name = f"mel{mels}"
    torch.testing.assert_close(frames[0][:, :64], golden[f"{name}.wave0.first64"], **close)
    torch.testing.assert_close(
        frames[1][:, 1000:1008], golden[f"{name}.wave1.frames_1000_1008"], **close
    )
    torch.testing.assert_close(frames[2][:, :8], golden[f"{name}.wave2.first8"], **close)
    every = torch.stack(frames)
    torch.testing.assert_close(every[:, :, -1], golden[f"{name}.last_frame"], **close)
    torch.testing.assert_close(every.sum(-1), golden[f"{name}.rowsum"], atol=0.1, rtol=1e-3)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_waveform_resamples_as_the_reference(golden, rate):
    out = waveform((golden[f"resample.{rate}_16000.in"], rate))
    torch.testing.assert_close(out, golden[f"resample.{rate}_16000.out"], atol=1e-5, rtol=0)


def test_without_a_window_frames_follow_the_clip():
    wave = torch.randn(1601)
    assert LogMel(80, None)(wave).shape == (80, 11)  # ten frames and one begun
    window = LogMel(80, 30)(F.pad(wave, (0, 159)))[:, :10]
    torch.testing.assert_close(LogMel(80, None)(wave)[:, :9], window[:, :9])


def test_silence_has_the_features_of_silence():
    assert torch.all(LogMel(80, None)(waveform((np.zeros(1600, np.float32), 16_000))) == -1.5)


def test_waveform_takes_any_layout_and_number_of_channels():
    left, right = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 800)).astype(np.float32)
    mono = torch.from_numpy((left + right) / 2)
    both = np.stack([left, right])
    for samples in (both, both.T, torch.from_numpy(both), both.astype(np.float64)):
        torch.testing.assert_close(waveform((samples, 16_000)), mono)
    whole = waveform(((left * 32768).astype(np.int16), 16_000))
    torch.testing.assert_close(whole, torch.from_numpy(left), atol=1e-4, rtol=0)


def test_waveform_computes_the_resampling_kernel_of_a_rate_once(monkeypatch):
    torchaudio = pytest.importorskip("torchaudio")
    wave = 0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    want = torchaudio.functional.resample(wave, 22050, 16000)
    assert torch.equal(waveform((wave, 22050)), want)
    monkeypatch.setattr(torchaudio.transforms, "Resample", None)
    assert torch.equal(waveform((wave, 22050)), want)


def test_waveform_resamples_odd_rates_without_a_huge_kernel():
    time = np.arange(44_101) / 44_101
    out = waveform((np.sin(2 * np.pi * 440 * time).astype(np.float32), 44_101))
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000)
    assert abs(len(out) - 16_000) <= 1
    torch.testing.assert_close(out[500:15_500], expected[500:15_500], atol=0.02, rtol=0)


GOOD = np.full(1600, 0.1, np.float32)


@pytest.mark.parametrize(
    ("item", "error", "says"),
    [
        (GOOD, TypeError, "expected \\(samples, rate\\)"),
        ((GOOD, "16000"), TypeError, "rate is str"),
        ((GOOD.astype(np.int32), 16_000), TypeError, "int16"),
        ((GOOD[:0], 16_000), ValueError, "empty"),
        ((GOOD[:399], 16_000), ValueError, "24.9 ms .* at least 25 ms"),
        ((GOOD, 0), ValueError, "rate is 0"),
        ((GOOD, -8000), ValueError, "rate is -8000"),
        ((GOOD, float("nan")), ValueError, "rate is nan"),
        ((np.append(GOOD, np.nan), 16_000), ValueError, "1 NaN or infinite samples of 1601"),
        ((np.append(GOOD, -np.inf), 16_000), ValueError, "1 NaN or infinite"),
        ((GOOD * 32768, 16_000), ValueError, "divide 16-bit values by 32768"),
        ((GOOD.reshape(1, 1, -1), 16_000), ValueError, "expected \\[T\\]"),
    ],
)
def test_waveform_says_what_is_wrong(item, error, says):
    with pytest.raises(error, match=says):
        waveform(item)


def test_nothing_is_cut_silently():
    with pytest.raises(ValueError, match=r"3.00 s .* the encoder takes at most 2.00 s.*windows"):
        waveform((np.zeros(24_000, np.float32), 8000), longest=2)
    with pytest.raises(ValueError, match="window holds 16000"):
        LogMel(80, 1)(torch.zeros(16_001))
    with pytest.raises(ValueError, match="multiple of 0.01"):
        LogMel(80, 1.005)
