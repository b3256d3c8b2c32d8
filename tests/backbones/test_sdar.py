from typing import Any

import pytest

from mmdlm.backbones.family import Spec
from mmdlm.backbones.sdar import SDAR

SMALL = {
    "architectures": ["SDARForCausalLM"],
    "model_type": "sdar",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "eos_token_id": 30,
}


def test_sdar_absent_keys_have_the_defaults_of_the_class() -> None:
    spec = SDAR.read({}, set())
    t = spec.transformer
    assert (t.vocab, t.width, t.inner, t.layers) == (151936, 4096, 22016, 32)
    assert (t.heads, t.keys_heads, t.head_width) == (32, 32, 128)
    assert (t.eps, t.theta, t.tied, t.qk_norm) == (1e-6, 1e4, False, "head")
    assert (t.qkv_bias, t.o_bias, t.bias, t.rotary_float32) == (False, False, False, False)
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (151669, 151643, 151643)
    assert (spec.stop_ids, spec.shift, spec.template) == ((151645,), False, "chatml")
    assert (spec.attention, spec.block_size, spec.context) == ("block_causal", 4, 32768)


def test_sdar_stop_ids_are_rows_of_the_embedding() -> None:
    spec = SDAR.read(SMALL, set())
    assert (spec.eos_id, spec.mask_id, spec.pad_id, spec.stop_ids) == (30, None, 30, ())
    generation = SDAR.read({"eos_token_id": [151645, 151643]}, set())
    assert (generation.eos_id, generation.stop_ids) == (151645, (151643,))


@pytest.mark.parametrize(
    ("change", "width"), [({}, 128), ({"head_dim": None}, 4), ({"head_dim": 6}, 6)]
)
def test_sdar_head_is_128_wide_unless_the_config_sets_it(
    change: dict[str, Any], width: int
) -> None:
    assert SDAR.read(SMALL | change, set()).transformer.head_width == width


@pytest.mark.parametrize("given", [{}, {"block_size": None}])
def test_sdar_block_size_may_be_absent(given: dict[str, Any]) -> None:
    assert SDAR.read(SMALL | given, set()).block_size == 4
    assert SDAR.read(SMALL | {"block_size": 16}, set()).block_size == 16


def test_sdar_attention_bias_includes_the_output_projection() -> None:
    t = SDAR.read(SMALL | {"attention_bias": True}, set()).transformer
    assert (t.qkv_bias, t.o_bias, t.bias) == (True, True, False)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"tie_word_embeddings": True, "rope_theta": 5e5, "block_size": 8},
        {"attention_bias": True, "head_dim": None, "rms_norm_eps": 1e-5},
        {"eos_token_id": [30, 3], "pad_token_id": 5, "mask_token_id": 7, "head_dim": 6},
        {"vocab_size": 151936, "eos_token_id": 151643, "max_position_embeddings": 64},
    ],
)
def test_sdar_written_config_reads_back(variant: dict[str, Any]) -> None:
    spec = SDAR.read(SMALL | variant, set())
    assert SDAR.read(SDAR.write(spec), set()) == spec


@pytest.mark.parametrize(
    ("change", "named"),
    [({"shift": True}, "shift"), ({"attention": "full"}, "attention"), ({"eos_id": 3}, None)],
)
def test_sdar_spec_without_a_published_config_is_rejected(
    change: dict[str, Any], named: str | None
) -> None:
    spec = Spec(**vars(SDAR.read(SMALL, set())) | change)
    if named is None:
        assert SDAR.read(SDAR.write(spec), set()) == spec
        return
    with pytest.raises(ValueError, match=f"published SDAR config.json cannot express .*{named}"):
        SDAR.write(spec)


def test_sdar_is_distinguished_from_families_of_the_same_name() -> None:
    names = {"model.layers.0.self_attn.q_norm.weight"}
    assert SDAR.matches(SMALL, names)
    assert SDAR.matches({"model_type": "sdar"}, names)
    assert not SDAR.matches({"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar"}, names)
    assert not SDAR.matches({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, names)
