import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdlm.backbones.llada2_moe import LLaDA2MoE
from mmdlm.backbones.llada_moe import LLaDAMoE
from mmdlm.checkpoint import load, save, save_published
from mmdlm.layout import from_tokens
from mmdlm.model import MultimodalDLM

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
SMALL = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 10,
    "n_group": 3,
    "topk_group": 2,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
    "routed_scaling_factor": 2.5,
    "use_bias": False,
    "vocab_size": 32,
    "eos_token_id": 30,
    "pad_token_id": 30,
    "block_size": 4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "bias by default": {"use_bias": ...},
    "biases of queries, keys and values": {"use_qkv_bias": True},
    "all biases": {"use_qkv_bias": True, "use_bias": True},
    "no norm of queries and keys": {"use_qk_norm": False},
    "full rotary": {"partial_rotary_factor": 1.0},
    "quarter rotary": {"partial_rotary_factor": 0.25},
    "separate head width": {"head_dim": 12},
    "head width by default": {"head_dim": None},
    "as many keys as queries": {"num_key_value_heads": 0},
    "no dense layer": {"first_k_dense_replace": 0, "intermediate_size": None},
    "two dense layers": {"first_k_dense_replace": 2},
    "dense layers only": {"first_k_dense_replace": 3},
    "no experts": {"num_experts": None},
    "no groups": {"n_group": 1, "topk_group": 1},
    "groups of one": {"n_group": 6, "topk_group": 4},
    "all groups": {"topk_group": 3},
    "one group": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
    "one expert": {"num_experts_per_tok": 1},
    "no shared expert": {"num_shared_experts": None},
    "two shared experts": {"num_shared_experts": 2},
    "weights as they are": {"routed_scaling_factor": 1.0},
    "router without bias": {"moe_router_enable_expert_bias": False},
    "tied": {"tie_word_embeddings": True},
    # The published code ignores these.
    "ignored": {"norm_topk_prob": False, "norm_head": True, "score_function": "sigmoid"},
    "everything": {
        "use_qkv_bias": True,
        "use_bias": True,
        "use_qk_norm": False,
        "partial_rotary_factor": 0.75,
        "num_key_value_heads": 1,
        "num_shared_experts": 3,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 0.7,
    },
}


def variant(name: str) -> dict[str, Any]:
    return {k: v for k, v in (SMALL | VARIANTS[name]).items() if v is not ...}


@pytest.fixture(scope="module")
def model(golden: Path) -> MultimodalDLM:
    return load(golden / "backbones" / "llada2_moe")


@pytest.fixture(scope="module")
def numbers(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "backbones" / "llada2_moe" / "golden.safetensors")


def assert_close_to(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, **TOLERANCE)


@torch.inference_mode()
def test_llada2_moe_logits_equal_the_reference(
    model: MultimodalDLM, numbers: dict[str, Tensor]
) -> None:
    ids, size = numbers["input_ids"], int(numbers["block_length"])
    assert_close_to(model.logits(ids, attention="full"), numbers["logits_full"])
    blocks = model.logits(ids, attention="block_causal", block_size=size)
    assert_close_to(blocks, numbers["logits_block_causal"])
    assert_close_to(model.logits(ids, block_size=size), numbers["logits_block_causal"])


@torch.inference_mode()
def test_llada2_moe_additive_mask_equals_the_reference(
    model: MultimodalDLM, numbers: dict[str, Tensor]
) -> None:
    ids = numbers["input_ids"]
    block = torch.arange(ids.shape[1]) // int(numbers["block_length"])
    seen = (block <= block[:, None]).expand(2, 1, -1, -1)
    for blocked in (-torch.inf, torch.finfo(torch.float32).min):
        mask = torch.zeros(seen.shape).masked_fill(~seen, blocked)
        logits = model.logits(ids, mask=mask, attention="full")
        assert_close_to(logits, numbers["logits_block_causal"])


@pytest.mark.parametrize("attention", ["full", "block_causal"])
@torch.inference_mode()
def test_llada2_moe_rows_left_padded_equal_rows_alone(
    model: MultimodalDLM, numbers: dict[str, Tensor], attention: str
) -> None:
    ids, how = numbers["input_ids"], {"attention": attention, "block_size": 8}
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :7], mask[1, :2] = False, False
    logits = model.logits(ids, mask=mask, **how)
    assert logits.isfinite().all()
    for row, start in ((0, 7), (1, 2)):
        alone = model.logits(ids[row : row + 1, start:], **how)[0]
        torch.testing.assert_close(logits[row, start:], alone, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_llada2_moe_cache_agrees_with_a_full_pass(
    model: MultimodalDLM, numbers: dict[str, Tensor]
) -> None:
    ids, n = numbers["input_ids"], numbers["input_ids"].shape[1]
    canvas, full = from_tokens(ids, None, "block_causal", 8), model.logits(ids, block_size=8)
    kv = model.backbone.cache(2, n)
    for start in range(0, n, 8):  # block by block; later blocks are not in the cache yet
        rows, kv.end = slice(start, start + 8), start + 8
        assert_close_to(model.run(canvas, rows, rows, kv), full[:, rows])
    inside = slice(10, 13)  # read fewer rows than are recomputed
    assert_close_to(model.run(canvas, slice(8, 16), inside, kv), full[:, inside])


# Independent reference implementation: plain loops, float64, published names.


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + eps) * weight


def turn(head: Tensor, position: int, theta: float, width: int) -> Tensor:
    half, out = (width + 1) // 2, head.clone()  # an odd width rotates one channel more
    for j in range(half):
        angle = position * theta ** (-2 * j / width)
        a, b = head[j], head[j + half]
        out[j] = a * math.cos(angle) - b * math.sin(angle)
        out[j + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def route(x: Tensor, w: dict[str, Tensor], at: str, config: dict[str, Any]) -> dict[int, Tensor]:
    s = 1 / (1 + (-(w[f"{at}.weight"] @ x)).exp())
    r = (s + w.get(f"{at}.expert_bias", 0)).tolist()
    size, k = len(r) // config["n_group"], config["num_experts_per_tok"]
    groups = [range(g * size, (g + 1) * size) for g in range(config["n_group"])]
    groups.sort(key=lambda g: -sum(sorted((r[e] for e in g), reverse=True)[:2]))
    reach = [e for group in groups[: config["topk_group"]] for e in group]
    routed = sorted(reach, key=lambda e: -r[e])[:k]
    total = sum(float(s[e]) for e in routed) if k > 1 else 1
    return {e: s[e] / total * config["routed_scaling_factor"] for e in routed}


def slow_logits(config: dict[str, Any], weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    w = {k.removeprefix("model."): v.double() for k, v in weights.items()}
    heads, eps, block = config["num_attention_heads"], config["rms_norm_eps"], config["block_size"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config["num_key_value_heads"] or heads
    rotary = int(size * config.get("partial_rotary_factor", 0.5))

    def linear(x: Tensor, name: str) -> Tensor:
        y = w[f"{name}.weight"] @ x
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def mlp(x: Tensor, at: str) -> Tensor:
        gate = linear(x, f"{at}.gate_proj")
        inner = gate / (1 + (-gate).exp()) * linear(x, f"{at}.up_proj")
        return linear(inner, f"{at}.down_proj")

    def feed_forward(x: Tensor, layer: int) -> Tensor:
        at = f"layers.{layer}.mlp"
        if config["num_experts"] is None or layer < config["first_k_dense_replace"]:
            return mlp(x, at)
        routed = route(x, w, f"{at}.gate", config)
        y = sum(p * mlp(x, f"{at}.experts.{e}") for e, p in routed.items())
        return y + mlp(x, f"{at}.shared_experts") if config["num_shared_experts"] else y

    def normed(parts: list[Tensor], name: str, t: int) -> list[Tensor]:
        if config.get("use_qk_norm", True):
            parts = [rms(part, w[name], eps) for part in parts]
        return [turn(part, t, config["rope_theta"], rotary) for part in parts]

    xs = [w["word_embeddings.weight"][i] for i in ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}.attention"
        q, k, v = [], [], []
        for t, x in enumerate(xs):
            a = rms(x, w[f"layers.{layer}.input_layernorm.weight"], eps)
            parts = linear(a, f"{at}.query_key_value").split(size)
            q.append(normed(parts[:heads], f"{at}.query_layernorm.weight", t))
            k.append(normed(parts[heads : heads + kv_heads], f"{at}.key_layernorm.weight", t))
            v.append(parts[heads + kv_heads :])
        for t in range(len(xs)):
            seen, mixed = [s for s in range(len(xs)) if s // block <= t // block], []
            for h in range(heads):
                g = h // (heads // kv_heads)
                scores = torch.stack([q[t][h] @ k[s][g] for s in seen]) / math.sqrt(size)
                share = scores.softmax(0)
                mixed.append(sum(p * v[s][g] for p, s in zip(share, seen, strict=True)))
            xs[t] = xs[t] + linear(torch.cat(mixed), f"{at}.dense")
            m = rms(xs[t], w[f"layers.{layer}.post_attention_layernorm.weight"], eps)
            xs[t] = xs[t] + feed_forward(m, layer)
    head = "word_embeddings" if config.get("tie_word_embeddings") else "lm_head"
    return torch.stack([w[f"{head}.weight"] @ rms(x, w["norm.weight"], eps) for x in xs])


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    rows = (heads + 2 * (config["num_key_value_heads"] or heads)) * size
    weights = {
        "model.word_embeddings.weight": torch.randn(config["vocab_size"], width, generator=g),
        "model.norm.weight": torch.rand(width, generator=g) + 0.5,
    }
    if not config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = torch.randn(config["vocab_size"], width, generator=g)

    def linear(name: str, n_out: int, n_in: int, biased: bool = False) -> None:
        weights[f"model.layers.{name}.weight"] = torch.randn(n_out, n_in, generator=g) * 0.3
        if biased:
            weights[f"model.layers.{name}.bias"] = torch.randn(n_out, generator=g)

    def mlp(name: str, inner: int) -> None:
        linear(f"{name}.gate_proj", inner, width)
        linear(f"{name}.up_proj", inner, width)
        linear(f"{name}.down_proj", width, inner)

    for i in range(config["num_hidden_layers"]):
        linear(f"{i}.attention.query_key_value", rows, width, config.get("use_qkv_bias", False))
        linear(f"{i}.attention.dense", width, heads * size, config.get("use_bias", True))
        norms = {"input_layernorm": width, "post_attention_layernorm": width}
        if config.get("use_qk_norm", True):
            norms |= {"attention.query_layernorm": size, "attention.key_layernorm": size}
        for name, n in norms.items():
            weights[f"model.layers.{i}.{name}.weight"] = torch.rand(n, generator=g) + 0.5
        if config["num_experts"] is None or i < config["first_k_dense_replace"]:
            mlp(f"{i}.mlp", config["intermediate_size"])
            continue
        linear(f"{i}.mlp.gate", config["num_experts"], width)
        if config.get("moe_router_enable_expert_bias", True):
            bias = torch.randn(config["num_experts"], generator=g) * 0.3
            weights[f"model.layers.{i}.mlp.gate.expert_bias"] = bias
        for e in range(config["num_experts"]):
            mlp(f"{i}.mlp.experts.{e}", config["moe_intermediate_size"])
        if shared := config["num_shared_experts"]:
            mlp(f"{i}.mlp.shared_experts", config["moe_intermediate_size"] * shared)
    return weights


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_llada2_moe_config_variant_equals_plain_loops(name: str, tmp_path: Path) -> None:
    config = variant(name)
    weights = random_weights(config)
    model = load(write(tmp_path, config, weights))
    assert set(model.report.loaded) == set(weights)
    ids = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(1))
    for row, ours in zip(ids.tolist(), model.logits(ids), strict=True):
        assert_close_to(ours.double(), slow_logits(config, weights, row))


@pytest.mark.parametrize("name", VARIANTS)
def test_llada2_moe_saved_as_published_is_bit_equal(name: str, tmp_path: Path) -> None:
    config = variant(name)
    weights = random_weights(config)
    model = load(write(tmp_path / "a", config, weights))
    save_published(model, tmp_path / "b")
    again, written = load(tmp_path / "b"), load_file(tmp_path / "b" / "model.safetensors")
    assert again.spec == model.spec
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[k], weights[k]) for k in weights)


def test_llada2_moe_saved_in_our_layout_is_bit_equal(tmp_path: Path) -> None:
    config = variant("everything")
    model = load(write(tmp_path / "a", config, random_weights(config)), dtype="bfloat16")
    save(model, tmp_path / "b")
    again = load(tmp_path / "b", dtype="bfloat16")
    assert again.spec == model.spec
    assert again.spec.transformer.moe.dense == (0,)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert {k for k in second if second[k].dtype == torch.float32} == {
        f"backbone.blocks.{i}.moe.router.bias" for i in (1, 2)
    }


def test_llada2_moe_router_bias_stays_float32(golden: Path, tmp_path: Path) -> None:
    folder = golden / "backbones" / "llada2_moe"
    weights, model = load_file(folder / "model.safetensors"), load(folder, dtype="bfloat16")
    name = "model.layers.2.mlp.gate.expert_bias"
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.backbone.blocks[2].moe.router.bias, weights[name])
    assert torch.equal(model.float().backbone.blocks[2].moe.router.bias, weights[name])
    save_published(model, tmp_path, dtype="bfloat16")
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written[name], weights[name])
    assert written["model.layers.2.mlp.gate.weight"].dtype == torch.bfloat16


def test_llada2_moe_absent_keys_have_the_defaults_of_the_class() -> None:
    spec = LLaDA2MoE.read({"moe_intermediate_size": 512, "vocab_size": 157184}, set())
    t = spec.transformer
    assert (t.width, t.layers, t.heads, t.keys_heads, t.head_width) == (1024, 24, 16, 16, 64)
    assert (t.eps, t.theta, t.rotary, t.tied) == (1e-5, 1e4, 0.5, False)
    assert (t.qkv_bias, t.o_bias, t.bias, t.qk_norm) == (False, True, False, "head")
    assert (t.moe.experts, t.moe.top, t.moe.groups, t.moe.top_groups) == (16, 2, 8, 4)
    assert (t.moe.dense, t.moe.shared, t.moe.scale, t.moe.bias) == ((), 0, 2.5, True)
    assert (t.moe.score, t.moe.normalize, t.moe.bias_weighs) == ("sigmoid", True, False)
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (156895, 156892, 156892)
    assert (spec.shift, spec.attention, spec.block_size) == (False, "block_causal", 32)


def test_llada2_moe_block_size_of_the_config_is_used() -> None:
    sizes = {k: v for k, v in SMALL.items() if k != "block_size"}
    assert LLaDA2MoE.read(sizes, set()).block_size == 32
    assert LLaDA2MoE.read(sizes | {"block_size": 16}, set()).block_size == 16
    assert LLaDA2MoE.read(sizes | {"block_length": 8}, set()).block_size == 8


def test_llada2_moe_mask_of_a_small_vocabulary_is_unknown_unless_the_config_has_it() -> None:
    assert LLaDA2MoE.read(SMALL, set()).mask_id is None
    assert LLaDA2MoE.read(SMALL | {"mask_token_id": 7}, set()).mask_id == 7
    with pytest.raises(ValueError, match="mask_id is 156895, expected an id below the 32 rows"):
        LLaDA2MoE.read(SMALL | {"mask_token_id": 156895}, set())


def test_llada2_moe_router_bias_in_the_checkpoint_is_used() -> None:
    config = SMALL | {"moe_router_enable_expert_bias": False}
    names = {"model.layers.1.mlp.gate.expert_bias"}
    assert LLaDA2MoE.read(config, names).transformer.moe.bias
    assert not LLaDA2MoE.read(config, set()).transformer.moe.bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*gelu.*expected"),
        ({"score_function": "softmax"}, "score_function.*softmax.*expected"),
        ({"use_sliding_window": True}, "use_sliding_window.*expected"),
        ({"rope_scaling": {"type": "yarn"}}, "rotary scaling 'yarn'"),
        ({"n_group": 4}, "MoEConfig.groups is 4, expected a divisor"),
        ({"topk_group": 4}, "MoEConfig.top_groups is 4, expected at most"),
        ({"num_experts_per_tok": 5}, "MoEConfig.top is 5, expected at most the 4"),
        ({"moe_intermediate_size": None}, "lacks moe_intermediate_size, the width of an expert"),
        ({"intermediate_size": None}, "inner is 0, expected at least 1 for an MLP layer"),
    ],
)
def test_llada2_moe_rejects_unpublished_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLaDA2MoE.read(SMALL | changes, set())


def test_llada2_moe_reads_the_rotary_keys_where_transformers_5_puts_them() -> None:
    moved = {"rope_theta": 7e4, "rope_type": "default", "partial_rotary_factor": 0.25}
    config = {k: v for k, v in SMALL.items() if k not in moved} | {"rope_parameters": moved}
    t = LLaDA2MoE.read(config, set()).transformer
    assert (t.theta, t.rotary) == (7e4, 0.25)


def test_llada2_moe_is_distinguished_from_others() -> None:
    names = {"model.word_embeddings.weight", "model.layers.0.attention.query_key_value.weight"}
    sizes = {"hidden_size": 64, "moe_intermediate_size": 24, "num_experts": 8}
    ours = {"architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe"}
    for config in (ours, ours | sizes, {"model_type": "llada2_moe"}, sizes):
        assert LLaDA2MoE.matches(config, names)
        assert not LLaDAMoE.matches(config, names)
    assert LLaDA2MoE.matches({"model_type": "llada21_moe"}, names)
    bailing = {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe"}
    assert not LLaDA2MoE.matches(bailing | sizes, names)
    assert not LLaDA2MoE.matches({"model_type": "bailing_moe"} | sizes, names)
    assert not LLaDA2MoE.matches(sizes, {"model.layers.0.self_attn.q_proj.weight"})
    moe = {"architectures": ["LLaDAMoEModelLM"], "model_type": "llada"}
    assert not LLaDA2MoE.matches(moe | sizes, names)
    assert not LLaDA2MoE.matches({}, set())


@pytest.mark.parametrize("absent", [["architectures"], ["architectures", "model_type"]])
def test_llada2_moe_folder_is_recognised_by_its_tensors(absent: list[str], tmp_path: Path) -> None:
    config = {k: v for k, v in SMALL.items() if k not in absent}
    assert load(write(tmp_path, config, random_weights(config))).spec.family == "llada2_moe"


def test_llada2_moe_spec_without_a_published_config_is_rejected(golden: Path) -> None:
    config = json.loads((golden / "backbones/llada_moe/config.json").read_text())
    spec = LLaDAMoE.read(config, set())
    with pytest.raises(ValueError, match="published LLaDA2MoE config.json cannot express .*moe"):
        LLaDA2MoE.write(spec)
