"""Rotary settings against the configs and models of transformers 5."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdlm.backbones.a2d import A2D
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.llada import LLaDA
from mmdlm.backbones.llada2_moe import LLaDA2MoE
from mmdlm.backbones.rotary import RopeScaling, Rotary, read_rope
from mmdlm.blueprint import Blueprint
from mmdlm.checkpoint import load, save, save_published

LENGTH = 64
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 40,
    "max_position_embeddings": LENGTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "old spelling": {"type": "linear", "factor": 4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, every setting": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 16,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    "yarn with a factor on attention": {
        "rope_type": "yarn",
        "factor": 2.0,
        "attention_factor": 0.8,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5],
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", SCALINGS)
@torch.inference_mode()
def test_scaled_model_equals_transformers(name: str, place: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = SIZES | {"rope_theta": 700.0, place: SCALINGS[name]}
    theirs = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager")).eval()
    theirs.save_pretrained(tmp_path)
    config = settings | {"model_type": "a2d-llama", "mask_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load(tmp_path)
    # Shorter and longer than every length at which a method changes its frequencies.
    for length in (10, 40, 100):
        ids = torch.randint(4, 48, (1, length), generator=torch.Generator().manual_seed(length))
        expected = theirs(input_ids=ids, attention_mask=torch.zeros(1, 1, length, length)).logits
        torch.testing.assert_close(ours.logits(ids), expected, atol=2e-5, rtol=0)


PLACES: dict[str, dict[str, Any]] = {
    "beside": {"rope_theta": 300.0},
    "original beside": {"original_max_position_embeddings": 24},
    "old": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "old with a base": {"rope_scaling": {"type": "linear", "factor": 3.0, "rope_theta": 400.0}},
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "new and scaled": {"rope_parameters": {"rope_type": "llama3"} | SCALINGS["llama3"]},
    "new, other original": {
        "rope_parameters": SCALINGS["yarn"] | {"rope_theta": 600.0, "type": "linear"}
    },
    "null": {"rope_scaling": None},
    "empty": {"rope_scaling": {}, "rope_parameters": {}},
}


@pytest.mark.parametrize(
    "names", [*itertools.combinations(PLACES, 1), *itertools.permutations(PLACES, 2)]
)
def test_disagreeing_places_have_the_precedence_of_transformers(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config: dict[str, Any] = dict(SIZES)
    for name in names:
        config |= PLACES[name]
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    sizes = A2D.read(config | {"model_type": "a2d-llama", "mask_token_id": 3}, set()).transformer
    ours = Rotary(sizes.rotary_width, sizes.theta, sizes.rope)
    ours(torch.arange(4)[None])
    assert torch.equal(ours.frequency, theirs.inv_freq)
    assert ours.factor == theirs.attention_scaling


def test_tables_by_layer_type_are_read_where_all_layers_agree() -> None:
    table = {"full_attention": SCALINGS["linear"] | {"rope_theta": 90.0}}
    for types in (None, ["full_attention"] * 2):
        found = read_rope({"rope_parameters": table, "layer_types": types})
        assert (found["theta"], found["rope"]) == (90.0, RopeScaling("linear", factor=2.5))
    both = table | {"sliding_attention": {"rope_type": "default", "rope_theta": 90.0}}
    assert read_rope({"rope_parameters": both})["rope"].factor == 2.5
    mixed = {"rope_parameters": both, "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(ValueError, match="entries for full_attention, sliding_attention, .* equal"):
        read_rope(mixed)
    with pytest.raises(ValueError, match="expected equal settings"):
        read_rope(mixed | {"rope_parameters": {"full_attention": None, "sliding_attention": {}}})


def test_partial_rotation_inside_the_table_wins() -> None:
    config = {"partial_rotary_factor": 0.25, "rope_parameters": {"partial_rotary_factor": 0.75}}
    assert read_rope(config, rotary=0.5)["rotary"] == 0.75
    assert read_rope({"partial_rotary_factor": 0.25}, rotary=0.5)["rotary"] == 0.25
    assert read_rope({}, rotary=0.5)["rotary"] == 0.5
    with pytest.raises(ValueError, match="partial_rotary_factor is 0.75, expected 1"):
        read_rope(config)


@pytest.mark.parametrize("theta", [0, -1.0, float("nan"), float("inf"), "10000", True, [1e4]])
@pytest.mark.parametrize("place", ["beside", "rope_parameters", "rope_scaling"])
def test_base_that_gives_wrong_angles_is_rejected(theta: Any, place: str) -> None:
    config = {"rope_theta": theta}
    config = config if place == "beside" else {place: config}
    with pytest.raises(
        ValueError, match=r"rope_theta is .*, expected a finite .*load\(theta=...\)"
    ):
        read_rope(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0}, "factor is 0, expected"),
        ({"factor": -2.0}, "factor is -2.0, expected"),
        ({"factor": float("nan")}, "factor is nan"),
        ({"factor": float("inf")}, "factor is inf"),
        ({"factor": "8"}, "factor is '8'"),
        ({"factor": None}, "'llama3' lacks factor"),
        ({"low_freq_factor": 4.0}, "low_freq_factor is 4.0, expected less than high_freq_factor"),
        ({"low_freq_factor": 0}, "low_freq_factor is 0"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        ({"rope_type": "longrope"}, "'longrope' lacks short_factor, long_factor"),
        ({"rope_type": "ntk"}, r"'ntk' .* not supported, expected one of default.*theta_scale"),
        ({"rope_type": "mrope"}, "'mrope'"),
    ],
)
def test_scaling_that_gives_wrong_angles_is_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read_rope({"rope_scaling": SCALINGS["llama3"] | change})
    with pytest.raises(ValueError, match="rope_scaling is 'yarn', expected an object"):
        read_rope({"rope_scaling": "yarn"})


def test_scaling_that_does_not_fit_the_sizes_is_rejected() -> None:
    scaling = read_rope({"rope_scaling": SCALINGS["longrope"], "max_position_embeddings": 64})
    sizes = {"width": 64, "layers": 1, "heads": 4, "inner": 8}
    TransformerConfig(**sizes, **scaling)
    with pytest.raises(ValueError, match="short_factor has 8 numbers, expected 4"):
        TransformerConfig(**sizes | {"heads": 8}, **scaling)
    with pytest.raises(ValueError, match="theta_scale is 2.0, expected 1 with .*'longrope'"):
        TransformerConfig(**sizes, **scaling, theta_scale=2.0)
    with pytest.raises(ValueError, match="expected a base above 1"):
        TransformerConfig(**sizes, **scaling | {"theta": 1.0})


def test_own_layout_refuses_such_a_base_too() -> None:
    spec = A2D.read(SIZES | {"model_type": "a2d-llama", "mask_token_id": 3}, set())
    plain = Blueprint(spec).to_dict()
    plain["spec"]["transformer"]["theta"] = 0
    with pytest.raises(
        ValueError, match=r"here: TransformerConfig\.theta is 0, expected at least 1"
    ):
        Blueprint.from_dict(plain, "here")


def test_context_ends_where_frequencies_begin_to_depend_on_the_length() -> None:
    base = SIZES | {"model_type": "a2d-llama", "mask_token_id": 3}
    spec = A2D.read(base | {"rope_scaling": SCALINGS["longrope"]}, set())
    assert spec.context == 32
    with pytest.raises(ValueError, match="context is 64, expected at most 32"):
        replace(spec, context=64)
    assert A2D.read(base | {"rope_scaling": SCALINGS["llama3"]}, set()).context == LENGTH


def test_llada_refuses_what_its_code_does_not_have() -> None:
    config = LLaDA.write(
        replace(
            A2D.read(SIZES | {"model_type": "a2d-llama", "mask_token_id": 3}, set()),
            attention="full",
        )
    )
    with pytest.raises(ValueError, match="LLaDA: config.json has rotary scaling 'linear'"):
        LLaDA.read(config | {"rope_scaling": SCALINGS["linear"]}, set())


def test_llada2_scales_the_rotated_half() -> None:
    config = {"moe_intermediate_size": 8, "rope_scaling": SCALINGS["linear"], "mask_token_id": 3}
    sizes = LLaDA2MoE.read(config | {"eos_token_id": 2, "pad_token_id": 2}, set()).transformer
    assert (sizes.rotary, sizes.rope) == (0.5, RopeScaling("linear", factor=2.5))


@pytest.mark.parametrize("name", [n for n in SCALINGS if n != "default"])
@torch.inference_mode()
def test_scaling_survives_both_layouts(name: str, tmp_path: Path, golden: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    published = golden / "backbones" / "a2d_qwen3"
    for file in published.glob("*.safetensors"):
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((published / "config.json").read_text())
    half = config.get("head_dim", 128) // 2
    scaling = dict(SCALINGS[name])
    for key in ("short_factor", "long_factor"):
        if key in scaling:
            scaling[key] = [1.5] * half
    config |= {"rope_scaling": scaling, "mask_token_id": 3}
    (source / "config.json").write_text(json.dumps(config))
    model = load(source)
    save_published(model, tmp_path / "out")
    save(model, tmp_path / "own")
    assert load(tmp_path / "out").spec == load(tmp_path / "own").spec == model.spec
