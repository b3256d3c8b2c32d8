from typing import Any

import pytest

from mmdlm.backbones.fast_dllm_v2 import FastDLLMv2

SMALL = {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "model_type": "Fast_dLLM_Qwen",
    "bd_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "eos_token_id": 29,
    "pad_token_id": 29,
}


def test_fast_dllm_v2_absent_keys_have_the_defaults_of_the_class() -> None:
    spec = FastDLLMv2.read({}, set())
    t = spec.transformer
    assert (t.vocab, t.width, t.inner, t.layers) == (151936, 4096, 22016, 32)
    assert (t.heads, t.keys_heads, t.head_width) == (32, 32, 128)
    assert (t.eps, t.theta, t.tied, t.qk_norm) == (1e-6, 1e4, False, "none")
    assert (t.qkv_bias, t.o_bias, t.bias) == (True, False, False)
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (151665, 151645, 151645)
    assert (spec.stop_ids, spec.shift, spec.template) == ((151643,), True, "chatml_system")
    assert (spec.attention, spec.block_size) == ("block_causal", 32)


def test_fast_dllm_v2_biases_do_not_depend_on_a_key() -> None:
    for bias in (False, True):
        t = FastDLLMv2.read(SMALL | {"attention_bias": bias}, set()).transformer
        assert (t.qkv_bias, t.o_bias) == (True, False)


def test_fast_dllm_v2_block_is_the_one_it_was_trained_with() -> None:
    assert FastDLLMv2.read(SMALL | {"bd_size": 8}, set()).block_size == 8


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"tie_word_embeddings": True, "rope_theta": 1e6, "bd_size": 16},
        {"num_key_value_heads": None, "mask_token_id": 3, "eos_token_id": [29, 4]},
    ],
)
def test_fast_dllm_v2_written_config_reads_back(variant: dict[str, Any]) -> None:
    spec = FastDLLMv2.read(SMALL | variant, set())
    assert FastDLLMv2.read(FastDLLMv2.write(spec), set()) == spec


def test_fast_dllm_v2_is_distinguished_from_families_of_the_same_name() -> None:
    assert FastDLLMv2.matches(SMALL, set())
    assert FastDLLMv2.matches({"model_type": "Fast_dLLM_Qwen"}, set())
    assert not FastDLLMv2.matches({"architectures": ["Qwen2ForCausalLM"]}, set())
    assert not FastDLLMv2.matches({}, set())
