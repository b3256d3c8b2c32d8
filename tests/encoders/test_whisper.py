import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from encoders.features import Prepared
from encoders.whisper import WhisperEncoder, sinusoids

GOLDEN = Path(__file__).parents[1] / "golden" / "audio"


def rename(name: str) -> str:
    number = re.search(r"\.(\d+)\.", name)
    layer = number[1] if number else ""
    published = name.replace(f".{layer}.", ".{i}.") if number else name
    ours = {theirs: mine for mine, theirs in WhisperEncoder.KEYS.items()}
    return ours[published].replace("{i}", layer)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "diffa_io.safetensors")


META = json.loads((GOLDEN / "diffa_meta.json").read_text())


def published(**options) -> WhisperEncoder:
    """The golden encoder with its published weights."""
    config = META["whisper"]
    encoder = WhisperEncoder(
        dim=config["d_model"],
        layers=config["encoder_layers"],
        heads=config["encoder_attention_heads"],
        mels=config["num_mel_bins"],
        seconds=META["chunk_length_s"],
        hidden=config["encoder_ffn_dim"],
        positions=config["max_source_positions"],
        **options,
    )
    weights = load_file(GOLDEN / "whisper_encoder.safetensors")
    encoder.load_state_dict({rename(name): weights[name] for name in weights}, strict=True)
    return encoder.eval()


@pytest.fixture(scope="module")
def reference():
    return published()


@pytest.fixture
def mels(reference, golden):
    waves = [golden[f"wave_i16.{index}"].float() / 32768 for index in range(2)]
    return [reference.prepare((wave, 16_000)) for wave in waves]


@torch.no_grad()
def test_published_weights_give_the_reference_tokens(reference, golden, mels):
    features = reference(mels)
    assert features.mask.sum(1).tolist() == golden["enc.output_lengths"].tolist()
    torch.testing.assert_close(features.tokens, golden["enc.last_hidden_state"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_published_weights_give_the_reference_states(reference, golden, mels):
    states = reference.states(mels)
    assert len(states) == 13
    for layer in (0, 2, 5, 8, 11):
        torch.testing.assert_close(
            states[layer], golden[f"enc.hidden_states.{layer}"], atol=1e-4, rtol=0
        )


@torch.no_grad()
def test_hidden_layers_cover_the_whole_window(golden, mels):
    features = published(hidden_layers=META["acoustic_target_layer_ids"])(mels)
    assert features.tokens.shape[1] == 65
    assert [state.shape for state in features.hidden] == [(2, 100, 16)] * 4
    for layer, state in zip((2, 5, 8, 11), features.hidden, strict=True):
        torch.testing.assert_close(state, golden[f"enc.hidden_states.{layer}"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_hidden_layers_are_numbered_from_the_stem_to_the_final_norm(reference, mels):
    features = published(hidden_layers=[12, 0])(mels)
    torch.testing.assert_close(features.hidden[0][:, :65], features.tokens)
    torch.testing.assert_close(features.hidden[1], reference.states(mels)[0])
    assert reference(mels).hidden is None


@torch.no_grad()
def test_a_clip_has_the_same_hidden_states_alone_and_in_a_batch(mels):
    encoder = published(hidden_layers=(2, 12))
    for row, mel in enumerate(mels):
        for many, one in zip(encoder(mels).hidden, encoder([mel]).hidden, strict=True):
            torch.testing.assert_close(many[row], one[0], atol=1e-5, rtol=0)


def clip(frames: int, seed: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(seed)
    return rng.uniform(-0.5, 0.5, frames * 160).astype(np.float32), 16_000


@pytest.mark.parametrize("seconds", [None, 2.0])
@torch.no_grad()
def test_a_clip_gets_the_same_tokens_alone_and_in_a_batch(seconds):
    torch.manual_seed(0)
    encoder = WhisperEncoder(32, 3, 4, seconds=seconds, positions=100).eval()
    torch.nn.init.normal_(encoder.conv1.bias)
    torch.nn.init.normal_(encoder.conv2.bias)
    lengths = (33, 34, 35, 36, 120, 121, 199, 200, 3)
    mels = [encoder.prepare(clip(frames, frames)) for frames in lengths]
    batch, states = encoder(mels), encoder.states(mels)
    for row, (frames, mel) in enumerate(zip(lengths, mels, strict=True)):
        tokens = (frames - 1) // 2 + 1
        alone = encoder([mel]).tokens
        assert alone.shape == (1, tokens, 32)
        assert batch.mask[row].tolist() == [n < tokens for n in range(100)]
        torch.testing.assert_close(batch.tokens[row, :tokens], alone[0], atol=1e-5, rtol=0)
        for many, one in zip(states, encoder.states([mel]), strict=True):
            torch.testing.assert_close(many[row, :tokens], one[0, :tokens], atol=1e-5, rtol=0)


def test_gradients_reach_every_weight_and_never_the_padding():
    torch.manual_seed(0)
    encoder = WhisperEncoder.tiny()
    mels = [encoder.prepare(clip(frames, frames)) for frames in (50, 80)]
    for mel in mels:
        mel.tensor.requires_grad_()
    features = encoder(mels)
    features.tokens[features.mask].square().sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().sum() > 0, name
    assert all(mel.tensor.grad.abs().sum(0).gt(0).all() for mel in mels)


def test_example_is_encoded_by_the_tiny_encoder():
    encoder = WhisperEncoder.tiny()
    mels = [encoder.prepare(WhisperEncoder.example(seed)) for seed in range(3)]
    features = encoder(mels)
    assert features.tokens.shape == (
        3,
        max((m.tensor.shape[1] - 1) // 2 + 1 for m in mels),
        encoder.dim,
    )
    assert features.grid is None
    assert np.array_equal(WhisperEncoder.example(1)[0], WhisperEncoder.example(1)[0])


def test_fifty_tokens_per_second_whatever_the_rate():
    encoder = WhisperEncoder.tiny()
    for rate in (8000, 16_000, 44_100, 48_000):
        wave = np.random.default_rng(0).uniform(-0.1, 0.1, (rate, 2)).astype(np.float32)
        assert encoder([encoder.prepare((wave, rate))]).mask.sum() == 50


def test_a_whole_window_fits_and_more_is_refused():
    for encoder in (WhisperEncoder(16, 1, 2, seconds=2.0), WhisperEncoder(16, 1, 2, seconds=None)):
        most = int(encoder.longest)
        for rate in (16_000, 44_101):
            mel = encoder.prepare((np.full(most * rate, 0.1, np.float32), rate))
            assert encoder([mel]).mask.sum() == most * 50
        with pytest.raises(ValueError, match=rf"{most + 1}.00 s .* at most {most}.00 s.*windows"):
            encoder.prepare((np.zeros((most + 1) * 16_000, np.float32), 16_000))


def test_silence_and_a_short_click_give_finite_tokens():
    encoder = WhisperEncoder(16, 1, 2, seconds=2.0)
    click = np.zeros(400, np.float32)
    click[-1] = 1.0
    mels = [encoder.prepare((wave, 16_000)) for wave in (np.zeros(16_000, np.float32), click)]
    assert encoder(mels).tokens.isfinite().all()


@pytest.mark.parametrize("seconds", [None, 2.0])
def test_preprocessing_is_pickled_without_weights(seconds):
    encoder = WhisperEncoder(16, 1, 2, seconds=seconds, positions=100)
    data = pickle.dumps(encoder.preprocess)
    assert len(data) < 500
    item = WhisperEncoder.example()
    assert torch.equal(pickle.loads(data)(item).tensor, encoder.prepare(item).tensor)


@pytest.mark.parametrize("seconds", [None, 2.0])
@pytest.mark.parametrize(
    ("samples", "error"),
    [
        (np.zeros(0), r"audio is empty \[0\]"),
        (np.zeros((2, 0)), r"audio is empty \[2, 0\]"),
        (np.zeros(160), r"10.0 ms \(160 samples at 16000 Hz\), expected at least 25 ms"),
        (np.full(1600, np.nan), "1600 NaN or infinite samples of 1600"),
        (np.zeros(7200 * 16_000, np.int16), "7200.00 s .*, the encoder takes at most 2.00 s"),
        (
            np.zeros(32_001),
            r"2.00 s \(32001 samples at 16000 Hz\), the encoder takes at most 2.00 s",
        ),
    ],
)
def test_unusable_clips_are_rejected(seconds, samples, error):
    encoder = WhisperEncoder(16, 1, 2, seconds=seconds, positions=100)
    with pytest.raises(ValueError, match=error):
        encoder.prepare((samples, 16_000))


@pytest.mark.parametrize("seconds", [None, 2.0])
def test_the_shortest_clip_gives_two_tokens(seconds):
    encoder = WhisperEncoder(16, 1, 2, seconds=seconds, positions=100)
    features = encoder([encoder.prepare((np.full(400, 0.1, np.float32), 16_000))])
    assert features.tokens.shape == (1, 2, 16)
    assert features.tokens.isfinite().all()


def test_wrong_input_and_settings_are_named():
    encoder = WhisperEncoder.tiny()
    with pytest.raises(ValueError, match="no clips"):
        encoder([])
    with pytest.raises(ValueError, match=r"clip 1 is \[128, 10\], expected \[80 T\]"):
        encoder([Prepared("audio", torch.zeros(mels, 10)) for mels in (80, 128)])
    with pytest.raises(ValueError, match="1 to 400 frames"):
        encoder([Prepared("audio", torch.zeros(80, 401))])
    with pytest.raises(ValueError, match="multiple of heads"):
        WhisperEncoder(dim=100, heads=6)
    for options in ({"hidden_layers": (5,)}, {"hidden_layers": (-1,)}):
        with pytest.raises(ValueError, match="expected numbers from 0 to 4"):
            WhisperEncoder(**options)
    with pytest.raises(ValueError, match="seconds=None; .* a window"):
        WhisperEncoder(seconds=None, hidden_layers=(1,))
    with pytest.raises(ValueError, match="needs 1500 positions"):
        WhisperEncoder(seconds=30, positions=200)


def test_checkpoint_holds_weights_only_and_meta_construction_works():
    encoder = WhisperEncoder(16, 1, 2, seconds=None)
    names = {pattern.replace("{i}", "0") for pattern in WhisperEncoder.KEYS}
    assert set(encoder.state_dict()) == names
    with torch.device("meta"):
        empty = WhisperEncoder(16, 1, 2, seconds=None)
    empty.load_state_dict(encoder.state_dict(), assign=True)
    mel = empty.prepare(WhisperEncoder.example())
    torch.testing.assert_close(empty([mel]).tokens, encoder([mel]).tokens)


def test_half_precision_weights_take_the_same_frames():
    encoder = WhisperEncoder.tiny().to(torch.bfloat16)
    mels = [encoder.prepare(WhisperEncoder.example(seed)) for seed in range(2)]
    assert mels[0].tensor.dtype == torch.float32
    assert encoder(mels).tokens.dtype == torch.bfloat16


def test_sinusoids_start_with_sines_of_falling_speed():
    table = sinusoids(10, 8)
    torch.testing.assert_close(table[:, 0], torch.arange(10).float().sin())
    torch.testing.assert_close(table[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    torch.testing.assert_close(table[:, 3], (torch.arange(10) / 10_000).sin())
