"""The shared reader against the classes of transformers that the families derive from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdlm.backbones.a2d import A2D
from mmdlm.backbones.llama_config import LLAMA, QWEN2, QWEN3, Ids
from mmdlm.backbones.rotary import THETA
from mmdlm.backbones.sdar import SDAR
from mmdlm.checkpoint import load

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rope_theta": 700.0,
    "vocab_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TABLES = {"qwen2": QWEN2, "qwen3": QWEN3, "llama": LLAMA}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 without groups": ("qwen2", {"num_key_value_heads": None}),
    "qwen2 with wide heads": ("qwen2", {"head_dim": 12}),
    "qwen2 with a large epsilon": ("qwen2", {"rms_norm_eps": 1e-2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3 with default heads": ("qwen3", {}),
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama with narrow heads": ("llama", {"head_dim": 4}),
    "llama tied, one key head": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}


def of_transformers(kind: str, **changes: Any) -> torch.nn.Module:
    """A model of transformers with every tensor random, norms and biases too."""
    import transformers

    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES | changes, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def saved(model: torch.nn.Module, folder: Path, **changes: Any) -> Path:
    """The folder transformers writes, its config.json changed."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_a2d_config_variant_equals_transformers_without_its_causal_mask(
    name: str, tmp_path: Path
) -> None:
    kind, changes = VARIANTS[name]
    theirs = of_transformers(kind, **changes)
    ours = load(saved(theirs, tmp_path, model_type=f"a2d-{kind}", architectures=None))
    ids = torch.randint(0, 48, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, :3] = False
    # A mask of four dimensions replaces the causal one.
    seen = torch.zeros(2, 1, 10, 10).masked_fill(~mask[:, None, None], -1e9)
    expected = theirs(input_ids=ids, attention_mask=seen).logits
    torch.testing.assert_close(ours.logits(ids, mask)[mask], expected[mask], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_sdar_with_biases_equals_qwen3_under_a_block_causal_mask(tmp_path: Path) -> None:
    theirs = of_transformers("qwen3", attention_bias=True, head_dim=12, tie_word_embeddings=True)
    folder = saved(theirs, tmp_path, model_type="sdar", architectures=["SDARForCausalLM"])
    model = load(folder)
    assert (model.spec.attention, model.spec.block_size) == ("block_causal", 4)
    ids = torch.randint(0, 48, (1, 10), generator=torch.Generator().manual_seed(1))
    block = torch.arange(10) // 4
    hidden = block[None] > block[:, None]
    seen = torch.zeros(1, 1, 10, 10).masked_fill(hidden, -1e9)
    expected = theirs(input_ids=ids, attention_mask=seen).logits
    torch.testing.assert_close(model.logits(ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", TABLES)
def test_absent_keys_have_the_defaults_of_transformers(kind: str) -> None:
    import transformers

    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[kind]
    config = getattr(transformers, f"{name}Config")()
    for key, value in TABLES[kind].items():
        default = getattr(config, key, False)
        if key == "num_key_value_heads" and value is None:
            value = config.num_attention_heads
        assert default == value, key
    assert config.rope_parameters["rope_theta"] == THETA
    assert (
        A2D.read({"model_type": f"a2d-{kind}", "eos_token_id": 2}, set()).transformer.head_width
        == 128
    )


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "gelu"), ("mlp_bias", True), ("use_sliding_window", True)]
)
def test_unpublished_settings_are_rejected(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"SDAR: config.json .*{key}.*expected"):
        SDAR.read(SIZES | {key: value}, set())


IDS = Ids(mask=20, eos=10, pad=11, stops=(12, 13))


@pytest.mark.parametrize(
    ("config", "vocab", "mask", "eos", "pad", "stops"),
    [
        ({}, 30, 20, 10, 11, (12, 13)),
        ({"mask_token_id": 4, "eos_token_id": 12, "pad_token_id": 5}, 30, 4, 12, 5, (10, 13)),
        ({"mask_token_id": None, "eos_token_id": None, "pad_token_id": None}, 30, 20, 10, 11, None),
        ({"eos_token_id": [12, 10]}, 30, 20, 12, 11, (10, 13)),
        ({"eos_token_id": [10, 3]}, 30, 20, 10, 11, (3, 12, 13)),
        ({"eos_token_id": 3}, 30, 20, 3, 11, ()),
        ({}, 13, None, 10, 11, (12,)),
        ({"eos_token_id": 3}, 8, None, 3, 3, ()),
        ({"eos_token_id": [3, 9]}, 8, None, 3, 3, ()),
        ({"eos_token_id": []}, 30, 20, 10, 11, (12, 13)),
        ({}, 8, None, None, None, ()),
    ],
)
def test_special_ids_are_the_configs_then_the_published_ones(
    config: dict[str, Any],
    vocab: int,
    mask: int | None,
    eos: int,
    pad: int,
    stops: tuple[int, ...] | None,
) -> None:
    read = IDS.read(config, vocab)
    assert (read["mask_id"], read["eos_id"], read["pad_id"]) == (mask, eos, pad)
    if stops is not None:
        assert read["stop_ids"] == stops
