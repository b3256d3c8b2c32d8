from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmdlm.backbones.block import attend
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.moe import MoEConfig
from mmdlm.backbones.transformer import Transformer

TINY = TransformerConfig(vocab=13, width=16, layers=2, heads=4, inner=24, kv_heads=2)
EXPERTS = MoEConfig(experts=4, top=2, inner=8, dense=(0,), shared=8, bias=True)
SWITCHES = {
    "plain": {},
    "all heads": {"kv_heads": None},
    "one key head": {"kv_heads": 1},
    "separate head width": {"head_dim": 6},
    "half rotary": {"rotary": 0.5},
    "float32 rotary": {"rotary_float32": True},
    "norm per head": {"qk_norm": "head"},
    "norm over heads": {"qk_norm": "whole"},
    "biases": {"qkv_bias": True, "bias": True, "norm_bias": True},
    "bias of the output": {"o_bias": True},
    "clipped": {"clip": 0.2},
    "tied and scaled": {"tied": True, "embed_scale": 4.0, "logit_scale": 0.25},
    "experts": {"moe": EXPERTS},
    "experts in every layer": {"moe": replace(EXPERTS, dense=(), shared=0), "inner": 0},
}


def build(seed: int = 0, **switches: object) -> Transformer:
    backbone = Transformer(replace(TINY, **switches))
    generator = torch.Generator().manual_seed(seed)
    backbone.reset(generator)
    for weight in backbone.parameters():
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return backbone.eval()


def inputs(length: int = 7, batch: int = 2) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(3))
    return x, torch.arange(length).expand(batch, -1)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("read", [slice(2, 4), slice(6, 7), torch.tensor([[0, 3], [5, 1]])])
@torch.inference_mode()
def test_reading_rows_equals_the_full_pass(name: str, read: slice | Tensor) -> None:
    backbone = build(**SWITCHES[name])
    x, positions = inputs()
    mask = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(4)) < 0.6
    full = backbone(x, positions, mask=mask)
    some = backbone(x, positions, mask=mask, read=read)
    index = torch.arange(7)[read].expand(2, -1) if isinstance(read, slice) else read
    torch.testing.assert_close(some, full.gather(1, index[..., None].expand(-1, -1, 16)))


@pytest.mark.parametrize("name", SWITCHES)
@torch.inference_mode()
def test_rows_of_a_batch_do_not_mix(name: str) -> None:
    backbone = build(**SWITCHES[name])
    x, positions = inputs(batch=3)
    together = backbone(x, positions)
    for row in range(3):
        torch.testing.assert_close(backbone(x[row : row + 1], positions[:1])[0], together[row])


@pytest.mark.parametrize("name", SWITCHES)
@torch.inference_mode()
def test_only_distances_between_positions_matter(name: str) -> None:
    backbone = build(**SWITCHES[name])
    x, positions = inputs()
    torch.testing.assert_close(
        backbone(x, positions), backbone(x, positions + 50), atol=1e-4, rtol=0
    )
    assert not torch.allclose(backbone(x, positions), backbone(x, positions * 2), atol=1e-3)


@torch.inference_mode()
def test_mask_of_ones_equals_none() -> None:
    backbone = build()
    x, positions = inputs()
    ones = torch.ones(2, 7, 7, dtype=torch.bool)
    torch.testing.assert_close(backbone(x, positions, mask=ones), backbone(x, positions))


@torch.inference_mode()
def test_attention_is_not_causal() -> None:
    backbone = build()
    x, positions = inputs()
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.allclose(backbone(x, positions)[:, 0], backbone(changed, positions)[:, 0])


@torch.inference_mode()
def test_masked_keys_do_not_matter() -> None:
    backbone = build()
    x, positions = inputs()
    mask = torch.ones(2, 7, 7, dtype=torch.bool)
    mask[:, :, 2] = False
    changed = x.clone()
    changed[:, 2] = 100.0
    keep = [0, 1, 3, 4, 5, 6]
    before = backbone(x, positions, mask=mask)[:, keep]
    torch.testing.assert_close(backbone(changed, positions, mask=mask)[:, keep], before)


@torch.inference_mode()
def test_query_without_keys_is_finite_and_changes_no_other() -> None:
    backbone = build()
    x, positions = inputs()
    mask = torch.ones(2, 7, 7, dtype=torch.bool)
    mask[0, :2] = False  # two queries without keys
    mask[0, :, :2] = False
    out = backbone(x, positions, mask=mask)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0, 2:], backbone(x[:1, 2:], positions[:1, 2:])[0])


def random_mask(seed: int = 4) -> Tensor:
    """[2 7 7] bool in which every query sees itself at least."""
    seen = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(seed)) < 0.6
    return seen | torch.eye(7, dtype=torch.bool)


@pytest.mark.parametrize("read", [None, slice(2, 4), torch.tensor([[0, 3], [5, 1]])])
@pytest.mark.parametrize("blocked", [-torch.inf, torch.finfo(torch.float32).min, -1e4])
@torch.inference_mode()
def test_additive_mask_equals_the_bool_one(blocked: float, read: slice | Tensor | None) -> None:
    backbone, seen = build(), random_mask()
    x, positions = inputs()
    mask = torch.zeros(2, 7, 7).masked_fill(~seen, blocked)
    expected = backbone(x, positions, mask=seen, read=read)
    torch.testing.assert_close(backbone(x, positions, mask=mask, read=read), expected)


@torch.inference_mode()
def test_additive_mask_weighs_keys() -> None:
    backbone = build()
    x, positions = inputs()
    # A key twice is a key whose score is higher by log 2.
    twice = torch.cat([x, x[:, 3:4]], 1), torch.cat([positions, positions[:, 3:4]], 1)
    mask = torch.zeros(2, 7, 7)
    mask[:, :, 3] = torch.log(torch.tensor(2.0))
    torch.testing.assert_close(backbone(x, positions, mask=mask), backbone(*twice)[:, :7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocked", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("grad", [False, True])
def test_query_blocked_by_an_additive_mask_is_finite_and_changes_no_other(
    blocked: float, dtype: torch.dtype, grad: bool
) -> None:
    backbone = build().to(dtype)
    x, positions = inputs()
    x = x.to(dtype)
    mask = torch.zeros(2, 7, 7)
    mask[0, :2] = blocked  # two queries without keys
    mask[0, :, :2] = blocked
    with torch.set_grad_enabled(grad):
        out = backbone(x, positions, mask=mask)
        alone = backbone(x[:1, 2:], positions[:1, 2:])[0]
    assert out.dtype == dtype
    assert out.isfinite().all()
    near = {} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.0}
    torch.testing.assert_close(out[0, 2:], alone, **near)


@torch.inference_mode()
def test_additive_mask_under_autocast_equals_the_bool_one() -> None:
    backbone, seen = build(), random_mask()
    seen[0, 0] = False
    x, positions = inputs()
    mask = torch.zeros(2, 7, 7).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.autocast("cpu", torch.bfloat16):
        additive, plain = (backbone(x, positions, mask=m) for m in (mask, seen))
    torch.testing.assert_close(additive, plain, atol=0.05, rtol=0)


@torch.inference_mode()
def test_shared_key_heads_equal_repeated_ones() -> None:
    shared, full = build(), build(kv_heads=4)
    state = shared.state_dict()
    for name, weight in state.items():
        if ".qkv." in name:
            q, k, v = weight.split([16, 8, 8])
            state[name] = torch.cat(
                [q, *(p.view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16) for p in (k, v))]
            )
    full.load_state_dict(state)
    x, positions = inputs()
    torch.testing.assert_close(shared(x, positions), full(x, positions))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SWITCHES)
@torch.inference_mode()
def test_half_precision_stays_near_float32(name: str, dtype: torch.dtype) -> None:
    backbone = build(**SWITCHES[name])
    x, positions = inputs()
    exact = backbone.head(backbone(x, positions))
    half = backbone.to(dtype)
    logits = half.head(half(x.to(dtype), positions))
    assert logits.dtype == dtype
    assert (logits.float() - exact).abs().max() < 0.1 * exact.abs().max()


@torch.inference_mode()
def test_head_of_some_columns_equals_those_of_all() -> None:
    for switches in ({}, {"bias": True}, {"tied": True, "logit_scale": 0.5}):
        backbone = build(**switches)
        hidden = torch.randn(2, 3, 16)
        torch.testing.assert_close(
            backbone.head(hidden, slice(4, 9)), backbone.head(hidden)[..., 4:9]
        )


@torch.inference_mode()
def test_scales_multiply_embeddings_and_logits() -> None:
    plain, scaled = build(), build(embed_scale=3.0, logit_scale=0.5)
    scaled.load_state_dict(plain.state_dict())
    ids, hidden = torch.tensor([[1, 2]]), torch.randn(1, 2, 16)
    torch.testing.assert_close(scaled.tokens(ids), 3 * plain.tokens(ids))
    torch.testing.assert_close(scaled.head(hidden), 0.5 * plain.head(hidden))


def test_clip_bounds_queries_keys_and_values() -> None:
    backbone = build(clip=0.2)
    attention, x = backbone.blocks[0].attn, 10 * inputs()[0]
    for part in attention.project(x, None):
        assert part.abs().max() == 0.2
    x, positions = inputs()
    torch.testing.assert_close(build(clip=1e3)(x, positions), build()(x, positions))


def test_o_bias_is_on_the_output_projection_only() -> None:
    names = set(build(o_bias=True).state_dict()) - set(build().state_dict())
    assert names == {f"blocks.{i}.attn.o.bias" for i in range(2)}


def test_layers_are_dense_or_have_experts() -> None:
    first, second = build(moe=EXPERTS).blocks
    assert {n.partition(".")[0] for n in first.state_dict()} == {
        "attn",
        "attn_norm",
        "mlp",
        "mlp_norm",
    }
    assert {n.removeprefix("moe.") for n in second.state_dict() if n.startswith("moe.")} == {
        "router.weight",
        "router.bias",
        "experts.gate_up.weight",
        "experts.down.weight",
        "shared.gate_up.weight",
        "shared.down.weight",
    }
    assert not any(name.startswith("mlp.") for name in second.state_dict())
    assert list(second.moe.experts.gate_up.weight.shape) == [4, 16, 16]


def test_tied_model_has_no_separate_head() -> None:
    backbone = build(tied=True)
    assert backbone.out is None
    assert not any(name.startswith("out.") for name in backbone.state_dict())


@pytest.mark.parametrize("name", ["plain", "experts"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    x, positions = inputs()
    gradients = []
    for flag in (False, True):
        backbone = build(**SWITCHES[name]).train()
        backbone.checkpointing = flag
        backbone.head(backbone(x, positions, read=slice(2, 5))).square().sum().backward()
        gradients.append([p.grad for p in backbone.parameters() if p.grad is not None])
    for plain, checked in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checked)


@pytest.mark.parametrize("name", ["plain", "experts"])
def test_reset_is_repeatable_and_leaves_norms_at_one(name: str) -> None:
    first, second = (Transformer(replace(TINY, **SWITCHES[name])) for _ in range(2))
    for backbone in (first, second):
        backbone.reset(torch.Generator().manual_seed(5))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        if "norm" in name:
            assert bool((a == 1).all())


@pytest.mark.parametrize("name", ["plain", "experts"])
def test_reset_scales_the_outputs_of_residual_branches(name: str) -> None:
    backbone = Transformer(replace(TINY, width=64, inner=64, **SWITCHES[name]))
    backbone.reset(torch.Generator().manual_seed(5))
    for key, weight in backbone.named_parameters():
        if weight.ndim > 1:
            expected = 0.01 if key.endswith(("attn.o.weight", ".down.weight")) else 0.02
            assert abs(float(weight.detach().std()) - expected) < 0.15 * expected, key


def test_long_context_factor_is_a_larger_base() -> None:
    x, positions = inputs()
    stretched, other = build(theta_scale=4.0), build(theta=40_000.0)
    torch.testing.assert_close(stretched(x, positions), other(x, positions))


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"kv_heads": 3}, "4 query heads cannot share 3"),
        ({"width": 18}, "width 18 is not a multiple of 4 heads"),
        ({"inner": 0}, "inner is 0, expected at least 1 for an MLP layer"),
        ({"inner": 0, "moe": EXPERTS}, "inner is 0, expected at least 1 for an MLP layer"),
        ({"width": 18, "kv_heads": None}, "width 18 is not a multiple of 4 heads"),
    ],
)
def test_invalid_sizes_are_rejected(switches: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **switches)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("queries", [1, 3, 40])
@torch.inference_mode()
def test_bfloat16_attention_is_that_of_each_row_without_padding(queries: int, group: int) -> None:
    """Bit for bit on a CPU: padding must not change the order of the sums over the keys."""
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(6, 4, queries, 16, generator=draw).bfloat16()
    k, v = (torch.randn(6, 4 // group, 40, 16, generator=draw).bfloat16() for _ in range(2))
    mask, ends = torch.zeros(6, 1, queries, 40, dtype=torch.bool), []
    for i in range(6):
        first, last = (0, 40) if i == 0 else (3 * i - 2, 40 - i)
        mask[i, ..., first:last] = True
        ends.append(slice(first, last))
    found = attend(q, k, v, mask, group)
    for i, at in enumerate(ends):
        alone = attend(q[i : i + 1], k[i : i + 1, :, at], v[i : i + 1, :, at], None, group)
        assert found[i].equal(alone[0]), i
