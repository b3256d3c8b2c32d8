import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmdlm.backbones.a2d import A2D
from mmdlm.checkpoint import load

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "eos_token_id": 30,
}
KINDS = {
    "qwen2": {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"]},
    "qwen3": {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"]},
    "llama": {"model_type": "a2d-llama", "architectures": ["A2DLlamaLMHeadModel"]},
}


@pytest.mark.parametrize(
    ("kind", "bias", "norm", "mask", "template"),
    [
        ("qwen2", True, "none", 151665, "chatml"),
        ("qwen3", False, "head", 151669, "chatml"),
        ("llama", False, "none", 128256, "plain"),
    ],
)
def test_a2d_equals_its_base_model_with_full_attention(
    kind: str, bias: bool, norm: str, mask: int, template: str
) -> None:
    spec = A2D.read(SMALL | KINDS[kind] | {"vocab_size": 151936, "eos_token_id": None}, set())
    t = spec.transformer
    assert (t.qkv_bias, t.o_bias, t.qk_norm) == (bias, False, norm)
    assert (spec.mask_id, spec.template) == (mask, template)
    eos, pad = (128009, 128001) if kind == "llama" else (151645, 151643)
    assert (spec.eos_id, spec.pad_id, spec.stop_ids) == (eos, pad, (pad,))
    assert (spec.shift, spec.attention, spec.block_size) == (False, "full", None)


@pytest.mark.parametrize("kind", KINDS)
def test_a2d_with_a_block_size_is_block_causal(kind: str) -> None:
    spec = A2D.read(SMALL | KINDS[kind] | {"block_size": 8}, set())
    assert (spec.attention, spec.block_size) == ("block_causal", 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"tie_word_embeddings": True, "block_size": 8, "rope_theta": 1e6},
        {"head_dim": 6, "mask_token_id": 3, "eos_token_id": [30, 4]},
    ],
)
def test_a2d_written_config_reads_back(kind: str, variant: dict[str, Any]) -> None:
    spec = A2D.read(SMALL | KINDS[kind] | variant, set())
    config = A2D.write(spec)
    assert config["model_type"] == f"a2d-{kind}"
    assert A2D.read(config, set()) == spec


def test_a2d_written_config_keeps_biases_apart() -> None:
    spec = A2D.read(SMALL | KINDS["llama"] | {"attention_bias": True}, set())
    assert A2D.write(spec)["model_type"] == "a2d-llama"
    assert A2D.read(A2D.write(spec), set()) == spec


@pytest.mark.parametrize("kind", KINDS)
def test_a2d_is_distinguished_from_its_base_model(kind: str) -> None:
    names = {"model.embed_tokens.weight"}
    assert A2D.matches(KINDS[kind], names)
    assert A2D.matches({"model_type": f"a2d-{kind}"}, names)
    assert A2D.matches({"architectures": KINDS[kind]["architectures"]}, names)
    assert not A2D.matches({"model_type": kind}, names)
    assert not A2D.matches({"model_type": "a2d-qwen3_5"}, names)


def test_a2d_of_another_base_model_is_rejected() -> None:
    with pytest.raises(ValueError, match="model_type 'a2d-gpt2', expected one of a2d-qwen2"):
        A2D.read(SMALL | {"model_type": "a2d-gpt2"}, set())


@pytest.mark.parametrize(
    ("folder", "model_type", "families"),
    [("a2d_qwen2", "qwen2", "'a2d' or family='open_dllm'"), ("a2d_qwen3", "qwen3", "'a2d'")],
)
def test_plain_base_model_is_rejected_unless_a_family_is_named(
    golden: Path, tmp_path: Path, folder: str, model_type: str, families: str
) -> None:
    there = Path(shutil.copytree(golden / "backbones" / folder, tmp_path / "it"))
    config = json.loads((there / "config.json").read_text())
    named = {"model_type": model_type, "architectures": [f"{model_type.title()}ForCausalLM"]}
    (there / "config.json").write_text(json.dumps(config | named))
    with pytest.raises(ValueError, match=f"autoregressive model; .*, give family={families}"):
        load(there)
    assert load(there, family="a2d").spec == load(golden / "backbones" / folder).spec
