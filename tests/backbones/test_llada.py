import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmdlm.backbones.llada import LLaDA
from mmdlm.checkpoint import load
from mmdlm.layout import from_tokens

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
SMALL = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "d_model": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 20,
    "vocab_size": 30,
    "embedding_size": 32,
    "eos_token_id": 29,
    "pad_token_id": 29,
    "mask_token_id": 28,
    "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
    "weight_tying": False,
}


def assert_close_to(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, **TOLERANCE)


# Independent reference implementation: plain loops, float64, published names.


def rms(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = x / math.sqrt(float((x * x).mean()) + eps) * weight
    return y if bias is None else y + bias


def turn(head: Tensor, position: int, theta: float) -> Tensor:
    half = len(head) // 2
    out = head.clone()
    for j in range(half):
        angle = position * theta ** (-2 * j / len(head))
        a, b = head[j], head[j + half]
        out[j] = a * math.cos(angle) - b * math.sin(angle)
        out[j + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def slow_logits(
    config: dict[str, Any], weights: dict[str, Tensor], ids: list[int], real: list[bool]
) -> Tensor:
    w = {k.removeprefix("model.transformer."): v.double() for k, v in weights.items()}
    heads, width = config["n_heads"], config["d_model"]
    size = width // heads
    kv_heads = config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads)
    eps, theta = config.get("rms_norm_eps", 1e-5), config.get("rope_theta", 10000.0)

    def linear(x: Tensor, name: str) -> Tensor:
        y = w[f"{name}.weight"] @ x
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x: Tensor, name: str) -> Tensor:
        return rms(x, w[f"{name}.weight"], w.get(f"{name}.bias"), eps)

    xs = [w["wte.weight"][i] for i in ids]
    if config.get("input_emb_norm"):
        xs = [x * math.sqrt(width) for x in xs]
    for layer in range(config["n_layers"]):
        at = f"blocks.{layer}"
        q, k, v = [], [], []
        for t, x in enumerate(xs):
            a = norm(x, f"{at}.attn_norm")
            qt, kt, vt = (linear(a, f"{at}.{n}_proj") for n in "qkv")
            if config.get("attention_layer_norm"):
                qt, kt = norm(qt, f"{at}.q_norm"), norm(kt, f"{at}.k_norm")
            q.append([turn(h, t, theta) for h in qt.split(size)])
            k.append([turn(h, t, theta) for h in kt.split(size)])
            v.append(vt.split(size))
        for t in range(len(xs)):
            mixed = []
            for h in range(heads):
                g = h // (heads // kv_heads)
                seen = [s for s in range(len(xs)) if real[s]]
                scores = torch.stack([q[t][h] @ k[s][g] for s in seen]) / math.sqrt(size)
                share = scores.softmax(0)
                mixed.append(sum(p * v[s][g] for p, s in zip(share, seen, strict=True)))
            xs[t] = xs[t] + linear(torch.cat(mixed), f"{at}.attn_out")
            m = norm(xs[t], f"{at}.ff_norm")
            gate = linear(m, f"{at}.ff_proj")
            inner = gate / (1 + (-gate).exp()) * linear(m, f"{at}.up_proj")
            xs[t] = xs[t] + linear(inner, f"{at}.ff_out")
    rows = []
    for x in xs:
        h = norm(x, "ln_f")
        y = w["wte.weight"] @ h if config.get("weight_tying", True) else linear(h, "ff_out")
        rows.append(y / math.sqrt(width) if config.get("scale_logits") else y)
    return torch.stack(rows)


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    width, heads = config["d_model"], config["n_heads"]
    kv_heads = config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads)
    kv = width // heads * kv_heads
    inner = config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * width
    rows = config["embedding_size"] or config["vocab_size"]
    bias = config.get("include_bias", False)
    norm_bias = config.get("bias_for_layer_norm")
    norm_bias = bias if norm_bias is None else norm_bias
    weights: dict[str, Tensor] = {}

    def linear(name: str, n_out: int, n_in: int, biased: bool) -> None:
        weights[f"model.transformer.{name}.weight"] = torch.randn(n_out, n_in, generator=g) * 0.3
        if biased:
            weights[f"model.transformer.{name}.bias"] = torch.randn(n_out, generator=g)

    def norm(name: str, n: int) -> None:
        weights[f"model.transformer.{name}.weight"] = torch.rand(n, generator=g) + 0.5
        if norm_bias:
            weights[f"model.transformer.{name}.bias"] = torch.randn(n, generator=g)

    linear("wte", rows, width, False)
    norm("ln_f", width)
    if not config.get("weight_tying", True):
        linear("ff_out", rows, width, bias)
    for i in range(config["n_layers"]):
        for name, n in (("q_proj", width), ("k_proj", kv), ("v_proj", kv)):
            linear(f"blocks.{i}.{name}", n, width, bias or config.get("include_qkv_bias", False))
        linear(f"blocks.{i}.attn_out", width, width, bias)
        linear(f"blocks.{i}.ff_proj", inner, width, bias)
        linear(f"blocks.{i}.up_proj", inner, width, bias)
        linear(f"blocks.{i}.ff_out", width, inner, bias)
        norm(f"blocks.{i}.attn_norm", width)
        norm(f"blocks.{i}.ff_norm", width)
        if config.get("attention_layer_norm"):
            norm(f"blocks.{i}.q_norm", width)
            norm(f"blocks.{i}.k_norm", kv)
    return weights


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "null kv heads": {"n_kv_heads": None},
    "multi query": {"n_kv_heads": None, "multi_query_attention": True},
    "multi query off": {"multi_query_attention": False, "n_kv_heads": 4},
    "qkv bias": {"include_qkv_bias": True},
    "all biases": {"include_bias": True},
    "biases but not on norms": {"include_bias": True, "bias_for_layer_norm": False},
    "norm biases only": {"bias_for_layer_norm": True},
    "norm of queries and keys": {"attention_layer_norm": True},
    "norm of queries and keys with bias": {
        "attention_layer_norm": True,
        "bias_for_layer_norm": True,
        "include_qkv_bias": True,
    },
    "tied": {"weight_tying": True},
    "tied with biases": {"weight_tying": True, "include_bias": True},
    "scaled logits": {"scale_logits": True},
    "scaled embeddings": {"input_emb_norm": True},
    "ratio instead of inner size": {"mlp_hidden_size": None, "mlp_ratio": 3},
    "null embedding size": {"embedding_size": None},
    "everything": {
        "include_bias": True,
        "attention_layer_norm": True,
        "scale_logits": True,
        "input_emb_norm": True,
        "weight_tying": True,
        "n_kv_heads": 1,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_llada_config_variant_equals_plain_loops(name: str, tmp_path: Path) -> None:
    config = SMALL | VARIANTS[name]
    weights = random_weights(config)
    model = load(write(tmp_path, config, weights))
    ids = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    ours = model.logits(ids, mask=mask)
    for row in range(2):
        expected = slow_logits(config, weights, ids[row].tolist(), mask[row].tolist())
        assert_close_to(ours[row][mask[row]].double(), expected[mask[row]])


@torch.inference_mode()
def test_llada_hole_in_the_mask_keeps_positions(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    model = load(write(tmp_path, SMALL, weights))
    ids, mask = [3, 1, 4, 1, 5, 9], [True, True, False, False, True, True]
    ours = model.logits(torch.tensor([ids]), mask=torch.tensor([mask]))[0]
    expected = slow_logits(SMALL, weights, ids, mask)
    assert_close_to(ours[mask].double(), expected[torch.tensor(mask)])


def test_llada_absent_keys_have_the_defaults_of_the_class() -> None:
    needed = {"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu"}
    spec = LLaDA.read(needed | {"rope": True}, set())
    t = spec.transformer
    assert (t.width, t.heads, t.keys_heads, t.layers, t.inner) == (768, 12, 12, 12, 3072)
    assert (t.vocab, t.theta, t.eps, t.tied, t.rotary_float32) == (50304, 10000.0, 1e-5, True, True)
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (50256, 50256, 50256)
    assert (t.qkv_bias, t.bias, t.norm_bias, spec.shift) == (False, False, False, False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_type", "sequential"),
        ("layer_norm_type", "default"),
        ("activation_type", "swiglu"),
        ("rope", False),
        ("alibi", True),
        ("block_group_size", 2),
        ("layer_norm_with_affine", False),
    ],
)
def test_llada_rejects_unpublished_settings(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"LLaDA.*{key}.*expected"):
        LLaDA.read(SMALL | {key: value}, set())


@pytest.mark.parametrize("key", ["block_type", "layer_norm_type", "activation_type", "rope"])
def test_llada_rejects_absent_keys_with_an_unpublished_default(key: str) -> None:
    with pytest.raises(ValueError, match=f"LLaDA.*{key}"):
        LLaDA.read({k: v for k, v in SMALL.items() if k != key}, set())


def test_llada_rejects_contradicting_key_heads() -> None:
    with pytest.raises(ValueError, match="multi_query_attention with n_kv_heads 2"):
        LLaDA.read(SMALL | {"multi_query_attention": True}, set())


def test_llada_reads_the_rotary_base_where_transformers_5_puts_it() -> None:
    config = {k: v for k, v in SMALL.items() if k != "rope_theta"}
    inside = config | {"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}
    assert LLaDA.read(inside, set()).transformer.theta == 7e4
    assert LLaDA.read(config, set()).transformer.theta == 1e4
    with pytest.raises(ValueError, match="rotary scaling 'yarn'"):
        LLaDA.read(config | {"rope_scaling": {"type": "yarn", "factor": 4}}, set())


def test_llada_special_ids_must_be_rows_of_the_embedding() -> None:
    with pytest.raises(ValueError, match="mask_id is 126336, expected an id below the 32 rows"):
        LLaDA.read(SMALL | {"mask_token_id": 126336}, set())


def test_llada_published_vocabulary_ends_turns_with_its_own_id() -> None:
    ids = {"eos_token_id": 126081, "pad_token_id": 126081, "mask_token_id": 126336}
    spec = LLaDA.read(SMALL | ids | {"embedding_size": 126464, "vocab_size": 126464}, set())
    assert spec.stop_ids == (126348,)
    assert LLaDA.read(SMALL, set()).stop_ids == ()


@pytest.mark.parametrize("name", VARIANTS)
def test_llada_written_config_reads_back(name: str) -> None:
    spec = LLaDA.read(SMALL | VARIANTS[name], set())
    again = LLaDA.read(json.loads(json.dumps(LLaDA.write(spec))), set())
    assert again.transformer.keys_heads == spec.transformer.keys_heads
    assert again == spec


def test_llada_is_distinguished_from_families_of_the_same_name() -> None:
    ours = {"model.transformer.wte.weight"}
    llama = {"model.embed_tokens.weight"}
    dense = {"architectures": ["LLaDAModelLM"], "model_type": "llada"}
    assert LLaDA.matches(dense | {"d_model": 64}, ours)
    assert LLaDA.matches({"d_model": 64}, ours)
    assert LLaDA.matches({"model_type": "llada", "d_model": 64}, ours)
    assert not LLaDA.matches(dense | {"hidden_size": 64}, llama)
    moe = {"architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "hidden_size": 64}
    assert not LLaDA.matches(moe, llama)
    assert not LLaDA.matches({"architectures": ["MMadaModelLM"], "d_model": 64}, ours)
    assert not LLaDA.matches({"architectures": ["DreamModel"]}, llama)
    assert not LLaDA.matches({}, set())


@torch.inference_mode()
def test_llada_cache_variants_agree_with_a_full_pass(tmp_path: Path) -> None:
    model = load(write(tmp_path, SMALL, random_weights(SMALL)))
    ids = torch.randint(0, 28, (2, 8), generator=torch.Generator().manual_seed(2))
    canvas = from_tokens(ids, None, "full", None)
    full = model.logits(ids)
    kv = model.backbone.cache(2, 8)
    assert_close_to(model.run(canvas, slice(0, 8), slice(0, 8), kv), full)
    for start, stop in itertools.combinations(range(9), 2):
        rows = slice(start, stop)
        assert_close_to(model.run(canvas, rows, rows, kv), full[:, rows])
