import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdlm.backbones.dream import Dream
from mmdlm.checkpoint import load
from mmdlm.layout import from_tokens
from mmdlm.model import MultimodalDLM

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
SMALL = {
    "architectures": ["DreamModel"],
    "model_type": "Dream",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "mask_token_id": 30,
    "eos_token_id": 31,
    "pad_token_id": 31,
}


@pytest.fixture(scope="module")
def model(golden: Path) -> MultimodalDLM:
    return load(golden / "backbones" / "dream")


@pytest.fixture(scope="module")
def numbers(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "backbones" / "dream" / "golden.safetensors")


def assert_close_to(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, **TOLERANCE)


@torch.inference_mode()
def test_dream_padding_equals_the_reference(
    model: MultimodalDLM, numbers: dict[str, Tensor]
) -> None:
    mask = numbers["attention_mask"].bool()
    canvas = from_tokens(numbers["input_ids"], mask, "full", None)
    assert torch.equal(canvas.positions[mask], numbers["position_ids"][mask])
    logits = model.logits(numbers["input_ids"], mask=mask)
    assert logits.isfinite().all()
    source = mask[:, :-1]
    assert_close_to(logits[:, 1:][source], numbers["logits_masked"][:, :-1][source])
    # Only padding precedes the first token, so its own logits are used, as at position 0.
    assert_close_to(logits[0, 5], numbers["logits_masked"][0, 5])
    assert_close_to(model.logits(numbers["input_ids"])[:, 0], numbers["logits"][:, 0])


def test_dream_absent_keys_have_the_defaults_of_the_class() -> None:
    spec = Dream.read({}, set())
    t = spec.transformer
    assert (t.vocab, t.width, t.inner, t.layers) == (151936, 4096, 22016, 32)
    assert (t.heads, t.keys_heads, t.eps, t.theta, t.tied) == (32, 32, 1e-6, 1e4, False)
    assert (spec.mask_id, spec.pad_id, spec.eos_id, spec.stop_ids) == (
        151666,
        151643,
        151643,
        (151645,),
    )
    assert t.qkv_bias
    assert not t.bias
    assert spec.shift


def test_dream_biases_do_not_depend_on_a_key() -> None:
    assert Dream.read(SMALL | {"attention_bias": False}, set()).transformer.qkv_bias


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "gelu"), ("use_mrope", True), ("use_sliding_window", True)]
)
def test_dream_rejects_unpublished_settings(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Dream.*{key}.*expected"):
        Dream.read(SMALL | {key: value}, set())


def test_dream_reads_the_rotary_base_where_transformers_5_puts_it() -> None:
    inside = {"rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}}
    assert Dream.read(SMALL | inside, set()).transformer.theta == 3e5
    assert Dream.read(SMALL | inside | {"rope_theta": 2e5}, set()).transformer.theta == 3e5
    with pytest.raises(ValueError, match="rotary scaling 'yarn'"):
        Dream.read(SMALL | {"rope_scaling": {"rope_type": "yarn"}}, set())


@pytest.mark.parametrize(
    "variant", [{}, {"tie_word_embeddings": True}, {"head_dim": 8}, {"eos_token_id": [31, 3]}]
)
def test_dream_written_config_reads_back(variant: dict[str, Any]) -> None:
    spec = Dream.read(SMALL | {"rope_theta": 1e6} | variant, set())
    assert Dream.read(json.loads(json.dumps(Dream.write(spec))), set()) == spec


def test_dream_spec_without_a_published_config_is_rejected(golden: Path) -> None:
    from mmdlm.backbones.llada import LLaDA

    spec = LLaDA.read(json.loads((golden / "backbones/llada/config.json").read_text()), set())
    with pytest.raises(ValueError, match="published Dream config.json cannot express .*qkv_bias"):
        Dream.write(spec)


QWEN2_NAMES = {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"}
QWEN3_NAMES = {"model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight"}
LATER = SMALL | {"architectures": ["DreamForCausalLM"]}


@pytest.mark.parametrize(
    ("config", "names", "later"),
    [
        (SMALL, QWEN2_NAMES, False),
        (LATER, QWEN2_NAMES, False),
        (LATER | {"block_size": 32}, QWEN2_NAMES, False),
        (LATER, set(), False),
        (LATER, QWEN3_NAMES, True),
        (SMALL, QWEN3_NAMES, True),
        (LATER | {"block_size": 32}, set(), True),
    ],
)
def test_dream_successor_is_recognised_by_tensors_and_block_size(
    config: dict[str, Any], names: set[str], later: bool
) -> None:
    spec = Dream.read(config, names)
    t = spec.transformer
    assert (t.qk_norm, t.qkv_bias, spec.shift) == (
        ("head", False, False) if later else ("none", True, True)
    )
    assert (spec.attention, spec.block_size, spec.template) == (
        ("block_causal", 32, "chatml") if later else ("full", None, "chatml_system")
    )


def test_dream_successor_absent_keys_have_the_defaults_of_the_class() -> None:
    spec = Dream.read({"block_size": 32}, set())
    t = spec.transformer
    assert (t.width, t.heads, t.keys_heads, t.head_width, t.theta) == (4096, 32, 32, 128, 1e4)
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (151669, 151643, 151643)
    assert spec.stop_ids == (151645,)
    small = Dream.read(LATER | {"head_dim": None, "block_size": None}, QWEN3_NAMES)
    assert (small.transformer.head_width, small.block_size) == (4, 32)


@pytest.mark.parametrize(
    "variant", [{}, {"head_dim": 8, "attention_bias": True}, {"tie_word_embeddings": True}]
)
def test_dream_successor_written_config_reads_back(variant: dict[str, Any]) -> None:
    spec = Dream.read(LATER | {"block_size": 16} | variant, QWEN3_NAMES)
    config = json.loads(json.dumps(Dream.write(spec)))
    assert config["architectures"] == ["DreamForCausalLM"]
    assert Dream.read(config, set()) == spec


def test_dream_is_distinguished_from_other_families() -> None:
    assert Dream.matches({"architectures": ["DreamModel"], "model_type": "Dream"}, QWEN2_NAMES)
    assert Dream.matches({"model_type": "Dream"}, QWEN2_NAMES)
    for names in (QWEN2_NAMES, QWEN3_NAMES):
        assert Dream.matches(LATER, names)
    assert not Dream.matches({"architectures": ["Qwen2ForCausalLM"]}, QWEN2_NAMES)
    assert not Dream.matches({"architectures": ["LLaDAModelLM"], "model_type": "llada"}, set())
    assert not Dream.matches({}, QWEN2_NAMES)
