from typing import Any

import pytest

from mmdlm.backbones.open_dllm import OpenDLLM

SMALL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "eos_token_id": 30,
    "tie_word_embeddings": True,
}


def test_open_dllm_is_qwen2_with_logits_one_ahead() -> None:
    spec = OpenDLLM.read(SMALL | {"vocab_size": 151936, "eos_token_id": 151643}, set())
    t = spec.transformer
    assert (t.qkv_bias, t.o_bias, t.qk_norm, t.tied, t.theta) == (True, False, "none", True, 1e4)
    assert (spec.shift, spec.attention, spec.template) == (True, "full", "plain")
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (151665, 151643, 151643)
    assert spec.stop_ids == (151645,)


@pytest.mark.parametrize("variant", [{}, {"rope_theta": 1e6, "mask_token_id": 3, "head_dim": 6}])
def test_open_dllm_written_config_reads_back(variant: dict[str, Any]) -> None:
    spec = OpenDLLM.read(SMALL | variant, set())
    config = OpenDLLM.write(spec)
    assert config["model_type"] == "qwen2"
    assert OpenDLLM.read(config, set()) == spec


def test_open_dllm_is_never_guessed() -> None:
    assert not OpenDLLM.matches(SMALL, {"model.embed_tokens.weight"})
