"""DualAudio: parity with DIFFA's connectors, short clips, padding, stages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters.dual_audio import DualAudio
from encoders.features import Features

GOLDEN = Path(__file__).parents[1] / "golden" / "audio"
LAYERS = json.loads((GOLDEN / "diffa_meta.json").read_text())["acoustic_target_layer_ids"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "diffa_io.safetensors")


def published(name: str) -> str:
    """The published name of one of our tensors."""
    number = re.search(r"\.(\d+)\b", name)
    layer = number[1] if number else ""
    pattern = name.replace(f".{layer}", ".{i}") if number else name
    return DualAudio.KEYS[pattern].replace("{i}", layer)


def connectors(stage: int) -> DualAudio:
    adapter = DualAudio(16, 32, layers=4, heads=2, stage=stage)
    weights = load_file(GOLDEN / "diffa_adapters.safetensors")
    state = {name: weights.pop(published(name)) for name in adapter.state_dict()}
    assert not weights, "published tensors without a place"
    adapter.load_state_dict(state)
    return adapter.eval()


def encoded(golden: dict[str, Tensor]) -> Features:
    """The encoder's golden outputs."""
    tokens, lengths = golden["enc.last_hidden_state"], golden["enc.output_lengths"]
    hidden = tuple(golden[f"enc.hidden_states.{layer}"] for layer in LAYERS)
    return Features(tokens, torch.arange(tokens.shape[1]) < lengths[:, None], hidden=hidden)


def random_features(lengths: list[int], layers: int = 2, width: int = 8) -> Features:
    """Clips of the given numbers of frames; what stands past their end is NaN."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((len(lengths), max(lengths), width), torch.nan)
    for row, n in enumerate(lengths):
        tokens[row, :n] = torch.randn(n, width, generator=generator)
    window = (len(lengths), 11, width)
    hidden = tuple(torch.randn(window, generator=generator) for _ in range(layers))
    return Features(tokens, tokens[..., 0].isfinite(), hidden=hidden)


def row_of(features: Features, row: int) -> Features:
    """One clip as it is alone."""
    n = int(features.mask[row].sum())
    alone = slice(row, row + 1)
    hidden = tuple(state[alone] for state in features.hidden)
    return Features(features.tokens[alone, :n], features.mask[alone, :n], hidden=hidden)


@pytest.mark.parametrize("stage", [1, 2])
@torch.no_grad()
def test_published_weights_give_the_reference_tokens(golden, stage):
    out = connectors(stage)(encoded(golden))
    lengths = {1: golden["speech.stage1.attn"], 2: golden["speech.stage2.attn_reported"]}[stage]
    assert torch.equal(out.mask, lengths)
    expected = golden[f"speech.stage{stage}"]
    torch.testing.assert_close(out.tokens[out.mask], expected[out.mask], **CLOSE)


@torch.no_grad()
def test_published_weights_give_the_reference_connectors(golden):
    adapter, features = connectors(2), encoded(golden)
    acoustic = adapter.acoustic(features.hidden)
    torch.testing.assert_close(acoustic, golden["acoustic"], **CLOSE)
    semantic, _ = adapter.semantic(features.tokens, torch.ones_like(features.mask))
    torch.testing.assert_close(semantic, golden["semantic"], **CLOSE)


@torch.no_grad()
def test_queries_attend_in_both_directions():
    adapter = DualAudio(8, 12, layers=1, heads=2, prompt_size=5, inner=16).eval()
    hidden = torch.randn(1, 1, 7, 8)
    before = adapter.acoustic(hidden)
    adapter.acoustic.queries[0][:, -1] += 1
    changed = (adapter.acoustic(hidden) - before).abs().amax(-1)[0]
    assert (changed > 1e-5).all()


@torch.no_grad()
def test_every_frame_of_the_window_reaches_the_acoustic_tokens():
    adapter = DualAudio(8, 12, layers=2, heads=2, prompt_size=3, inner=16).eval()
    features = random_features([4, 9])
    before = adapter(features).tokens[:, :3]
    for state in features.hidden:
        state[:, -1] += 1
    changed = (adapter(features).tokens[:, :3] - before).abs().amax(-1)
    assert (changed > 1e-6).all()


@torch.no_grad()
def test_layers_are_weighed_for_each_query():
    adapter = DualAudio(8, 12, layers=2, heads=2, prompt_size=3, inner=16).eval()
    features = random_features([8])
    adapter.acoustic.layer_weights[0] = torch.tensor([1e4, 0.0])
    before = adapter(features).tokens[0, :3]
    features.hidden[1][:] += 1
    changed = (adapter(features).tokens[0, :3] - before).abs().amax(-1)
    assert changed[0] == 0
    assert (changed[1:] > 1e-6).all()


@pytest.mark.parametrize("stage", [1, 2])
@torch.no_grad()
def test_a_clip_gets_the_same_tokens_alone_and_in_a_batch(stage):
    torch.manual_seed(0)
    adapter = DualAudio(8, 12, layers=2, heads=2, prompt_size=5, inner=16, stage=stage).eval()
    lengths = [1, 2, 3, 4, 5, 7, 8, 39, 43]
    features = random_features(lengths)
    batch, first = adapter(features), 20 if stage == 1 else 5
    for row, n in enumerate(lengths):
        alone = adapter(row_of(features, row))
        count = first + max(1, n // 4)
        assert alone.tokens.shape == (1, count, 12)
        assert alone.mask.all()
        assert alone.tokens.isfinite().all()
        assert batch.mask[row].nonzero()[:, 0].tolist() == list(range(count))
        torch.testing.assert_close(batch.tokens[row, :count], alone.tokens[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_short_clip_is_padded_with_zeros():
    adapter = DualAudio(8, 12).eval()
    frames = torch.randn(1, 3, 8)
    padded = torch.cat([frames, torch.zeros(1, 1, 8)], 1)
    short = adapter(Features(frames, torch.ones(1, 3, dtype=torch.bool))).tokens
    full = adapter(Features(padded, torch.ones(1, 4, dtype=torch.bool))).tokens
    assert torch.equal(short, full)


def test_gradients_reach_the_weights_of_the_stage_only():
    for stage, used in ((1, ("prompts", "semantic.")), (2, ("acoustic.", "semantic."))):
        torch.manual_seed(0)
        adapter = DualAudio(8, 12, layers=2, heads=2, prompt_size=5, inner=16, stage=stage)
        out = adapter(random_features([3, 16]))
        # A plain sum would not depend on what the last norm centres.
        out.tokens[out.mask].square().mul(torch.arange(12)).sum().backward()
        for name, weight in adapter.named_parameters():
            # Softmax cancels the key's bias.
            reached = weight.grad is not None and weight.grad.isfinite().all()
            assert reached == name.startswith(used) == weight.requires_grad, name


def test_dropout_acts_in_training_only():
    adapter = DualAudio(8, 12, layers=2, heads=2, prompt_size=5, inner=16)
    features = random_features([16])
    assert not torch.equal(adapter(features).tokens, adapter(features).tokens)
    adapter.eval()
    assert torch.equal(adapter(features).tokens, adapter(features).tokens)


def test_sizes_follow_the_settings():
    adapter = DualAudio(24, 10, layers=8, heads=3, prompt_size=7)
    shapes = {name: tuple(weight.shape) for name, weight in adapter.named_parameters()}
    assert shapes["acoustic.layer_weights"] == (7, 8)
    assert shapes["acoustic.queries.7"] == (1, 7, 24)
    assert shapes["acoustic.blocks.1.up.weight"] == (3072, 24)
    assert shapes["semantic.conv2.weight"] == (96, 24, 3)
    assert shapes["prompts"] == (20, 10)


def test_wrong_settings_and_features_are_named():
    with pytest.raises(ValueError, match="stage=2 with layers=0"):
        DualAudio(8, 12, stage=2)
    with pytest.raises(ValueError, match="stage is 3, expected 1 or 2"):
        DualAudio(8, 12, stage=3)
    with pytest.raises(ValueError, match="in_dim 8 is not a multiple of heads=3"):
        DualAudio(8, 12, layers=1, heads=3)
    adapter = DualAudio(8, 12, layers=3, heads=2, inner=16)
    with pytest.raises(ValueError, match="hold 2 hidden states, expected 3.*hidden_layers"):
        adapter(random_features([8], layers=2))


@torch.no_grad()
def test_the_q_former_equals_transformers_bert():
    """Another width, number of layers and prompt size than the golden ones."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEncoder

    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=2,
        num_attention_heads=3,
        hidden_size=24,
        add_cross_attention=True,
        is_decoder=True,
        attn_implementation="eager",  # others attend causally
    )
    reference = BertEncoder(config).eval()
    adapter = DualAudio(24, 10, layers=8, heads=3, prompt_size=7).eval()
    weights = {f"acoustic_connector.qformer.{k}": v for k, v in reference.state_dict().items()}
    ours = {name for name in adapter.state_dict() if ".blocks." in name}
    assert {published(name) for name in ours} == set(weights)
    adapter.load_state_dict({name: weights[published(name)] for name in ours}, strict=False)
    torch.nn.init.normal_(adapter.acoustic.layer_weights)
    hidden = torch.randn(8, 2, 33, 24)
    shares = adapter.acoustic.layer_weights.softmax(-1)
    mixed = sum(
        shares[:, j, None]
        * reference(bank.expand(2, -1, -1), encoder_hidden_states=hidden[j]).last_hidden_state
        for j, bank in enumerate(adapter.acoustic.queries)
    )
    expected = adapter.acoustic.project(adapter.acoustic.norm(mixed))
    torch.testing.assert_close(adapter.acoustic(hidden), expected, atol=1e-5, rtol=1e-5)
