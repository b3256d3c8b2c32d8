from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdlm.backbones.llada import LLaDA
from mmdlm.backbones.llada_v import LLaDAV
from mmdlm.checkpoint import load

SMALL = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "bos_token_id": 128000,
    "eos_token_id": 30,
}
LLAMA_NAMES = {"model.embed_tokens.weight"}
LLADA_NAMES = {"model.transformer.wte.weight"}


def test_llada_v_absent_keys_have_the_defaults_of_the_class() -> None:
    spec = LLaDAV.read({"vocab_size": 126464}, set())
    t = spec.transformer
    assert (t.width, t.inner, t.layers, t.heads, t.keys_heads) == (4096, 11008, 32, 32, 32)
    assert (t.eps, t.theta, t.tied, t.qk_norm) == (1e-6, 1e4, False, "none")
    assert (t.qkv_bias, t.o_bias, t.rotary_float32) == (False, False, False)
    assert LLaDAV.read({"eos_token_id": 2}, set()).transformer.vocab == 32000
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (126336, 126081, 126081)
    assert (spec.stop_ids, spec.shift, spec.attention) == ((126348,), False, "full")
    assert (spec.template, spec.context) == ("llada", 2048)


def test_llada_v_ignores_the_bos_id() -> None:
    spec = LLaDAV.read(SMALL, set())
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (None, 30, 30)
    assert "bos_token_id" not in LLaDAV.write(spec)


@pytest.mark.parametrize(
    ("given", "heads"),
    [({}, 4), ({"num_key_value_heads": None}, 4), ({"num_key_value_heads": 2}, 2)],
)
def test_llada_v_may_group_its_heads(given: dict[str, Any], heads: int) -> None:
    assert LLaDAV.read(SMALL | given, set()).transformer.keys_heads == heads


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": True},
        {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "mask_token_id": 3, "pad_token_id": 4},
    ],
)
def test_llada_v_written_config_reads_back(variant: dict[str, Any]) -> None:
    spec = LLaDAV.read(SMALL | variant, set())
    assert LLaDAV.read(LLaDAV.write(spec), set()) == spec


@pytest.mark.parametrize(
    ("config", "names", "family"),
    [
        (SMALL, LLAMA_NAMES, LLaDAV),
        (SMALL, set(), LLaDAV),
        ({"model_type": "llada", "hidden_size": 16}, LLAMA_NAMES, LLaDAV),
        ({"architectures": ["LlavaLLaDAModelLM"], "hidden_size": 16}, LLAMA_NAMES, LLaDAV),
        (SMALL | {"d_model": 16}, LLAMA_NAMES, LLaDAV),
        (SMALL | {"d_model": 16}, LLADA_NAMES, LLaDA),
        ({"architectures": ["LLaDAModelLM"], "d_model": 16}, LLADA_NAMES, LLaDA),
        ({"model_type": "llada", "d_model": 16}, LLADA_NAMES, LLaDA),
        (SMALL | {"architectures": ["LLaDAMoEModelLM"], "num_experts": 8}, LLAMA_NAMES, None),
        ({"model_type": "llada", "hidden_size": 16, "num_experts": 8}, LLAMA_NAMES, None),
        (
            {"model_type": "llada", "hidden_size": 16},
            {*LLAMA_NAMES, "model.layers.0.mlp.experts.0.up_proj.weight"},
            None,
        ),
        ({"architectures": ["LLaDA2MoeModelLM"], "hidden_size": 16}, LLAMA_NAMES, None),
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": 16}, LLAMA_NAMES, None),
    ],
)
def test_llada_v_is_distinguished_from_llada_and_its_mixture_of_experts(
    config: dict[str, Any], names: set[str], family: type | None
) -> None:
    assert [f for f in (LLaDA, LLaDAV) if f.matches(config, names)] == ([family] if family else [])


def test_llada_v_image_tensors_are_ignored_by_the_family(golden: Path, tmp_path: Path) -> None:
    folder = golden / "backbones" / "llada_v"
    weights = {k: v for f in folder.glob("model*.safetensors") for k, v in load_file(f).items()}
    image = {
        "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight",
        "model.mm_projector.0.weight",
        "model.image_newline",
    }
    save_file(weights | {name: torch.ones(2) for name in image}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = load(tmp_path, family="llada_v")
    assert model.system is None
    assert set(model.report.loaded) == set(weights)
    assert set(model.report.ignored) == image
