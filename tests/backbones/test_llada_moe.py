import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdlm.backbones.llada import LLaDA
from mmdlm.backbones.llada_moe import LLaDAMoE
from mmdlm.backbones.llada_v import LLaDAV
from mmdlm.checkpoint import load, save, save_published
from mmdlm.model import MultimodalDLM

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
SMALL = {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "expert_intermediate_size": 10,
    "dense_intermediate_size": 20,
    "shared_expert_intermediate_size": None,
    "moe_layer_freq": [1, 1, 1],
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
    "vocab_size": 32,
    "eos_token_id": 30,
    "pad_token_id": 30,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "router bias": {"moe_router_enable_expert_bias": True},
    "shared expert": {"shared_expert_intermediate_size": 14},
    "dense layers between": {"moe_layer_freq": [0, 1, 0]},
    "dense layers only": {"moe_layer_freq": [0, 0, 0]},
    "longer list of layers": {"moe_layer_freq": [1, 0, 1, 1, 1]},
    "one expert": {"num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 6},
    "clipped": {"clip_qkv": 0.3},
    "clipped without norm": {"clip_qkv": 0.3, "qk_layernorm": False},
    "no norm of queries and keys": {"qk_layernorm": None},
    "biases": {"attention_bias": True},
    "half rotary": {"partial_rotary_factor": 0.67},
    "null kv heads": {"num_key_value_heads": None},
    "tied": {"tie_word_embeddings": True},
    # The published code ignores these.
    "ignored": {
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "moe_router_score_function": "sigmoid",
        "router_num_group": 3,
        "router_topk_group": 1,
    },
    "everything": {
        "moe_router_enable_expert_bias": True,
        "shared_expert_intermediate_size": 12,
        "moe_layer_freq": [1, 0, 1],
        "clip_qkv": 0.4,
        "attention_bias": True,
        "partial_rotary_factor": 0.67,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 3,
    },
}


@pytest.fixture(scope="module")
def model(golden: Path) -> MultimodalDLM:
    return load(golden / "backbones" / "llada_moe")


@pytest.fixture(scope="module")
def numbers(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "backbones" / "llada_moe" / "golden.safetensors")


def assert_close_to(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, **TOLERANCE)


@torch.inference_mode()
def test_llada_moe_under_autocast_agrees_with_float32(
    model: MultimodalDLM, numbers: dict[str, Tensor]
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(numbers["input_ids"])
    assert (logits.argmax(-1) == numbers["logits"].argmax(-1)).float().mean() >= 0.9


# Independent reference implementation: plain loops, float64, published names.


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + eps) * weight


def turn(head: Tensor, position: int, theta: float, width: int) -> Tensor:
    half, out = width // 2, head.clone()
    for j in range(half):
        angle = position * theta ** (-2 * j / width)
        a, b = head[j], head[j + half]
        out[j] = a * math.cos(angle) - b * math.sin(angle)
        out[j + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def slow_logits(
    config: dict[str, Any], weights: dict[str, Tensor], ids: list[int], real: list[bool]
) -> Tensor:
    w = {k.removeprefix("model."): v.double() for k, v in weights.items()}
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    size = config["hidden_size"] // heads
    group = heads // (config["num_key_value_heads"] or heads)
    rotary, clip = int(size * config["partial_rotary_factor"]), config.get("clip_qkv")

    def linear(x: Tensor, name: str) -> Tensor:
        y = w[f"{name}.weight"] @ x
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def mlp(x: Tensor, at: str) -> Tensor:
        gate = linear(x, f"{at}.gate_proj")
        inner = gate / (1 + (-gate).exp()) * linear(x, f"{at}.up_proj")
        return linear(inner, f"{at}.down_proj")

    def feed_forward(x: Tensor, at: str, sparse: int) -> Tensor:
        if not sparse:
            return mlp(x, f"{at}.mlp")
        odds = (w[f"{at}.mlp.gate.weight"] @ x).exp()
        p = odds / odds.sum()
        if config.get("moe_router_enable_expert_bias"):
            p = p + w[f"{at}.mlp.expert_bias"]
        routed = sorted(range(len(p)), key=lambda e: -float(p[e]))[: config["num_experts_per_tok"]]
        y = sum(p[e] * mlp(x, f"{at}.mlp.experts.{e}") for e in routed)
        shared = config["shared_expert_intermediate_size"] is not None
        return y + mlp(x, f"{at}.shared_expert") if shared else y

    def project(x: Tensor, name: str, t: int) -> list[Tensor]:
        parts = linear(x, f"{name}_proj").split(size)
        norm = f"{name}_norm.weight"
        if norm in w:
            parts = [rms(part, w[norm], eps) for part in parts]
        if clip is not None:
            parts = [part.clamp(-clip, clip) for part in parts]
        if name.endswith("v"):
            return list(parts)
        return [turn(part, t, config["rope_theta"], rotary) for part in parts]

    xs = [w["embed_tokens.weight"][i] for i in ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}"
        normed = [rms(x, w[f"{at}.input_layernorm.weight"], eps) for x in xs]
        q, k, v = (
            [project(x, f"{at}.self_attn.{name}", t) for t, x in enumerate(normed)]
            for name in "qkv"
        )
        seen = [s for s in range(len(xs)) if real[s]]
        for t in range(len(xs)):
            mixed = []
            for h in range(heads):
                scores = torch.stack([q[t][h] @ k[s][h // group] for s in seen]) / math.sqrt(size)
                share = scores.softmax(0)
                mixed.append(sum(p * v[s][h // group] for p, s in zip(share, seen, strict=True)))
            xs[t] = xs[t] + linear(torch.cat(mixed), f"{at}.self_attn.o_proj")
            m = rms(xs[t], w[f"{at}.post_attention_layernorm.weight"], eps)
            xs[t] = xs[t] + feed_forward(m, at, config["moe_layer_freq"][layer])
    head = "embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return torch.stack([w[f"{head}.weight"] @ rms(x, w["norm.weight"], eps) for x in xs])


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv = width // heads * (config["num_key_value_heads"] or heads)
    weights = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], width, generator=g),
        "model.norm.weight": torch.rand(width, generator=g) + 0.5,
    }
    if not config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = torch.randn(config["vocab_size"], width, generator=g)

    def linear(name: str, n_out: int, n_in: int, biased: Any = False) -> None:
        weights[f"model.layers.{name}.weight"] = torch.randn(n_out, n_in, generator=g) * 0.3
        if biased:
            weights[f"model.layers.{name}.bias"] = torch.randn(n_out, generator=g)

    def mlp(name: str, inner: int) -> None:
        linear(f"{name}.gate_proj", inner, width)
        linear(f"{name}.up_proj", inner, width)
        linear(f"{name}.down_proj", width, inner)

    for i in range(config["num_hidden_layers"]):
        for name, rows in (("q", width), ("k", kv), ("v", kv), ("o", width)):
            linear(f"{i}.self_attn.{name}_proj", rows, width, config.get("attention_bias"))
        names = ["input_layernorm", "post_attention_layernorm"]
        names += ["self_attn.q_norm", "self_attn.k_norm"] if config["qk_layernorm"] else []
        for name in names:
            rows = width // heads if "self_attn" in name else width
            weights[f"model.layers.{i}.{name}.weight"] = torch.rand(rows, generator=g) + 0.5
        if not config["moe_layer_freq"][i]:
            mlp(f"{i}.mlp", config["dense_intermediate_size"])
            continue
        linear(f"{i}.mlp.gate", config["num_experts"], width)
        for e in range(config["num_experts"]):
            mlp(f"{i}.mlp.experts.{e}", config["expert_intermediate_size"])
        if config.get("moe_router_enable_expert_bias"):
            bias = torch.randn(config["num_experts"], generator=g) * 0.3
            weights[f"model.layers.{i}.mlp.expert_bias"] = bias
        if config["shared_expert_intermediate_size"] is not None:
            mlp(f"{i}.shared_expert", config["shared_expert_intermediate_size"])
    return weights


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_llada_moe_config_variant_equals_plain_loops(name: str, tmp_path: Path) -> None:
    config = SMALL | VARIANTS[name]
    weights = random_weights(config)
    model = load(write(tmp_path, config, weights))
    assert set(model.report.loaded) == set(weights)
    ids = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    ours = model.logits(ids, mask=mask)
    for row in range(2):
        expected = slow_logits(config, weights, ids[row].tolist(), mask[row].tolist())
        assert_close_to(ours[row][mask[row]].double(), expected[mask[row]])


@pytest.mark.parametrize("name", VARIANTS)
def test_llada_moe_saved_as_published_is_bit_equal(name: str, tmp_path: Path) -> None:
    config = SMALL | VARIANTS[name]
    weights = random_weights(config)
    model = load(write(tmp_path / "a", config, weights))
    save_published(model, tmp_path / "b")
    again, written = load(tmp_path / "b"), load_file(tmp_path / "b" / "model.safetensors")
    assert again.spec == model.spec
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[k], weights[k]) for k in weights)


def test_llada_moe_saved_in_our_layout_is_bit_equal(tmp_path: Path) -> None:
    config = SMALL | VARIANTS["everything"]
    model = load(write(tmp_path / "a", config, random_weights(config)))
    save(model, tmp_path / "b")
    again = load(tmp_path / "b")
    assert again.spec == model.spec
    assert again.spec.transformer.moe.dense == (1,)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_llada_moe_router_bias_stays_float32(tmp_path: Path) -> None:
    config = SMALL | {"moe_router_enable_expert_bias": True}
    weights = random_weights(config)
    folder = write(tmp_path / "a", config, weights)
    model = load(folder, dtype="bfloat16")
    name = "model.layers.1.mlp.expert_bias"
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.backbone.blocks[1].moe.router.bias, weights[name])
    save_published(model, tmp_path / "b", dtype="bfloat16")
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(written[name], weights[name])
    assert written["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_llada_moe_absent_keys_have_the_defaults_of_the_class() -> None:
    needed = (
        *("hidden_size", "num_attention_heads", "num_hidden_layers", "moe_layer_freq"),
        *("rope_theta", "vocab_size", "num_experts", "num_experts_per_tok"),
        "expert_intermediate_size",
    )
    sizes = {"vocab_size": 157184, "rope_theta": 5e4}
    spec = LLaDAMoE.read({k: SMALL[k] for k in needed} | sizes, set())
    t = spec.transformer
    assert (t.keys_heads, t.eps, t.theta, t.rotary, t.tied) == (4, 1e-5, 5e4, 1.0, False)
    assert (t.qkv_bias, t.o_bias, t.qk_norm, t.clip) == (False, False, "none", None)
    assert (t.moe.shared, t.moe.bias, t.moe.score, t.moe.normalize) == (0, False, "softmax", False)
    assert (t.moe.scale, t.moe.groups, t.moe.dense) == (1.0, 1, ())
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (156895, 156892, 156892)
    assert (spec.shift, spec.attention) == (False, "full")


REQUIRED = ["hidden_size", "moe_layer_freq", "rope_theta", "vocab_size", "num_experts"]


@pytest.mark.parametrize("key", REQUIRED)
def test_llada_moe_rejects_absent_keys_without_a_default(key: str) -> None:
    with pytest.raises(ValueError, match=f"LLaDAMoE: config.json lacks {key}, which"):
        LLaDAMoE.read({k: v for k, v in SMALL.items() if k != key}, set())


def test_llada_moe_mask_of_a_small_vocabulary_is_unknown_unless_the_config_has_it() -> None:
    assert LLaDAMoE.read(SMALL, set()).mask_id is None
    assert LLaDAMoE.read(SMALL | {"mask_token_id": 7}, set()).mask_id == 7
    with pytest.raises(ValueError, match="mask_id is 156895, expected an id below the 32 rows"):
        LLaDAMoE.read(SMALL | {"mask_token_id": 156895}, set())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*gelu.*expected"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotary scaling 'yarn'"),
        ({"moe_layer_freq": 1}, "moe_layer_freq in config.json is 1, expected 3"),
        ({"moe_layer_freq": [1, 1]}, r"moe_layer_freq in config.json is \[1, 1\], expected 3"),
        ({"num_experts_per_tok": 7}, "MoEConfig.top is 7, expected at most"),
        ({"moe_layer_freq": [0, 1, 1], "dense_intermediate_size": None}, "inner is 0"),
    ],
)
def test_llada_moe_rejects_unpublished_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLaDAMoE.read(SMALL | changes, set())


def test_llada_moe_reads_the_rotary_keys_where_transformers_5_puts_them() -> None:
    moved = {"rope_theta": 7e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    config = {k: v for k, v in SMALL.items() if k not in moved} | {"rope_parameters": moved}
    t = LLaDAMoE.read(config, set()).transformer
    assert (t.theta, t.rotary) == (7e4, 0.5)


def test_llada_moe_is_distinguished_from_families_of_the_same_name() -> None:
    llama, expert = "model.embed_tokens.weight", "model.layers.0.mlp.experts.0.gate_proj.weight"
    names = {llama, expert}
    ours = {"architectures": ["LLaDAMoEModelLM"], "model_type": "llada"}
    sizes = {"hidden_size": 64, "num_experts": 8, "expert_intermediate_size": 32}
    for config in (ours, ours | sizes, {"model_type": "llada"} | sizes, sizes):
        assert LLaDAMoE.matches(config, names)
        assert not LLaDA.matches(config, names)
        assert not LLaDAV.matches(config, names)
    dense = {"architectures": ["LLaDAModelLM"], "model_type": "llada", "hidden_size": 64}
    assert not LLaDAMoE.matches(dense, {llama})
    assert not LLaDAMoE.matches({"model_type": "llada", "hidden_size": 64}, {llama})
    assert not LLaDAMoE.matches({"model_type": "qwen3_moe"} | sizes, names)
    assert not LLaDAMoE.matches({"architectures": ["LLaDA2MoeModelLM"]} | sizes, names)
    assert not LLaDAMoE.matches({}, names)


@pytest.mark.parametrize("absent", [["architectures"], ["architectures", "model_type"]])
def test_llada_moe_folder_is_recognised_by_its_keys(absent: list[str], tmp_path: Path) -> None:
    config = {k: v for k, v in SMALL.items() if k not in absent}
    assert load(write(tmp_path, config, random_weights(config))).spec.family == "llada_moe"


def test_llada_moe_spec_without_a_published_config_is_rejected(golden: Path) -> None:
    config = json.loads((golden / "backbones/llada2_moe/config.json").read_text())
    from mmdlm.backbones.llada2_moe import LLaDA2MoE

    spec = LLaDA2MoE.read(config, set())
    with pytest.raises(ValueError, match="published LLaDAMoE config.json cannot express .*moe"):
        LLaDAMoE.write(spec)
