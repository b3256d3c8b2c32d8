import dataclasses
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmdlm.backbones import moe as module
from mmdlm.backbones.moe import MoE, MoEConfig, fits

PLAIN = MoEConfig(experts=8, top=3, inner=12)
ROUTINGS = {
    "softmax": {},
    "bias in the choice and the weights": {"bias": True, "bias_weighs": True},
    "bias in the choice": {"bias": True},
    "sigmoid": {"score": "sigmoid", "normalize": True, "scale": 2.5},
    "sigmoid with groups": {
        "score": "sigmoid",
        "bias": True,
        "normalize": True,
        "scale": 2.5,
        "groups": 4,
        "top_groups": 2,
    },
    "groups of one": {"groups": 8, "top_groups": 5},
    "one group": {"groups": 2, "top_groups": 1},
    "shared": {"shared": 20},
    "one expert": {"top": 1, "bias": True},
    "all experts": {"top": 8},
}
# Rows of 16 and 12 floats start at multiples of 16 bytes, those of 10 and 6 do not.
SIZES = {"aligned": (16, 12), "odd": (10, 6)}


def build(width: int = 16, dtype: torch.dtype = torch.float32, **changes: object) -> MoE:
    layer = MoE(width, replace(PLAIN, **changes))
    generator = torch.Generator().manual_seed(0)
    for weight in layer.state_dict().values():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return layer.to(dtype)


def tokens(n: int = 30, width: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


# Independent reference implementation: one token at a time, in float64.


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).tensor_split(2)
    return down @ (gate / (1 + (-gate).exp()) * up)


def route(x: Tensor, w: dict[str, Tensor], c: MoEConfig) -> dict[int, Tensor]:
    logits = w["router.weight"] @ x
    score = logits.exp() / logits.exp().sum() if c.score == "softmax" else 1 / (1 + (-logits).exp())
    ranked = score + w["router.bias"] if c.bias else score
    rank = ranked.tolist()
    size = c.experts // c.groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(c.groups)]
    groups.sort(key=lambda g: -sum(sorted((rank[e] for e in g), reverse=True)[:2]))
    within = [e for group in groups[: c.top_groups] for e in group]
    chosen = sorted(within, key=lambda e: -rank[e])[: c.top]
    weights = {e: (ranked if c.bias_weighs else score)[e] for e in chosen}
    total = sum(weights.values()) if c.normalize else 1
    return {e: weight / total * c.scale for e, weight in weights.items()}


def slow(layer: MoE, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    w, c = weights, layer.router.config
    rows = []
    for token in x:
        routed = route(token, w, c)
        y = sum(
            p * mlp(token, w["experts.gate_up.weight"][e], w["experts.down.weight"][e])
            for e, p in routed.items()
        )
        if c.shared:
            y = y + mlp(token, w["shared.gate_up.weight"], w["shared.down.weight"])
        rows.append(y)
    return torch.stack(rows)


def doubled(layer: MoE) -> dict[str, Tensor]:
    return {name: t.detach().double() for name, t in layer.state_dict().items()}


@pytest.fixture(params=["grouped", "loop"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "loop":
        monkeypatch.setattr(module, "fits", lambda *operands: False)
    return request.param


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ROUTINGS)
@torch.inference_mode()
def test_experts_equal_one_token_at_a_time(name: str, size: str) -> None:
    width, inner = SIZES[size]
    layer = build(width, inner=inner, **ROUTINGS[name])
    x = tokens(width=width)
    torch.testing.assert_close(layer(x), slow(layer, doubled(layer), x.double()).float())
    # Only the size selects between the two implementations.
    assert fits(x, layer.experts.gate_up.weight) == (size == "aligned")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_gradients_of_experts_equal_those_of_the_formula(name: str, size: str) -> None:
    width, inner = SIZES[size]
    layer = build(width, inner=inner, **ROUTINGS[name])
    x = tokens(width=width).requires_grad_()
    weights, y = doubled(layer), x.detach().double().requires_grad_()
    for weight in weights.values():
        weight.requires_grad_()
    toward = tokens(width=width, seed=2)
    (layer(x) * toward).sum().backward()
    (slow(layer, weights, y) * toward).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-5, rtol=1e-4)
    for weight_name, weight in layer.named_parameters():
        expected = weights[weight_name].grad
        torch.testing.assert_close(weight.grad.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_ways_to_multiply_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = build(inner=16, dtype=dtype), tokens().to(dtype).requires_grad_()
    results = []
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr(module, "fits", lambda *operands: False)
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.experts.down.weight.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


@torch.inference_mode()
def test_tokens_do_not_depend_on_one_another(path: str) -> None:
    layer, x = build(shared=8), tokens(60)
    whole = layer(x)
    torch.testing.assert_close(layer(x[7:12]), whole[7:12])
    torch.testing.assert_close(layer(x.flip(0)).flip(0), whole)
    torch.testing.assert_close(layer(x.view(3, 4, 5, 16)).view(60, 16), whole)
    crowd = torch.cat([x[:1].expand(500, -1), x])  # all routed to the same experts
    torch.testing.assert_close(layer(crowd)[500:], whole)


@torch.inference_mode()
def test_experts_without_tokens_do_not_matter(path: str) -> None:
    layer, x = build(experts=64, top=2), tokens(1)
    routed = set(route(x[0].double(), doubled(layer), layer.router.config))
    for e in set(range(64)) - routed:
        layer.experts.gate_up.weight[e] = torch.nan
    torch.testing.assert_close(layer(x), slow(layer, doubled(layer), x.double()).float())


def test_gradient_of_an_expert_without_tokens_is_zero(path: str) -> None:
    layer, x = build(experts=64, top=2), tokens(1)
    layer(x).sum().backward()
    routed = set(route(x[0].double(), doubled(layer), layer.router.config))
    used = layer.experts.down.weight.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist()
    assert set(used) == routed


def test_results_repeat_bit_by_bit(path: str) -> None:
    layer = build(shared=8)
    runs = []
    for _ in range(2):
        x = tokens(200).requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        runs.append([y, x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_autocast_multiplies_in_bfloat16_and_routes_in_float32(size: str) -> None:
    width, inner = SIZES[size]
    layer = build(width, inner=inner, shared=8, **ROUTINGS["sigmoid with groups"])
    x = tokens(200, width)
    exact = layer(x)
    weights, chosen = layer.router(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        cast_weights, cast_chosen = layer.router(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(cast_chosen, chosen)
    assert torch.equal(cast_weights, weights)
    assert (y.float() - exact).norm() < 0.01 * exact.norm()
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_experts_stay_near_float32(dtype: torch.dtype, path: str) -> None:
    layer = build(shared=8, **ROUTINGS["sigmoid"])
    # Both from the same rounded numbers, so that the router breaks near-ties equally.
    x = tokens(200).to(dtype).float()
    for weight in layer.state_dict().values():
        weight.copy_(weight.to(dtype))
    exact = layer(x)
    half = layer.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    assert (half.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_router_of_a_half_precision_model_computes_in_float32(dtype: torch.dtype) -> None:
    layer, x = build(dtype=dtype, bias=True), tokens(200).to(dtype)
    half = layer.router(x)
    exact = layer.float().router(x.float())
    assert all(torch.equal(a, b) for a, b in zip(half, exact, strict=True))


@torch.inference_mode()
def test_weighted_sum_of_a_half_precision_model_is_in_float32() -> None:
    layer, x = build(experts=6, top=6, inner=16), tokens(200).bfloat16()
    for weight in layer.state_dict().values():
        weight.copy_(weight[:1].clone())  # six equal experts
    layer.router.weight.zero_()  # with equal weights
    layer.bfloat16()
    every = layer.experts(x.repeat(6, 1), torch.arange(200, 1400, 200, dtype=torch.int32))
    assert torch.equal(layer(x), every[:200])


@torch.inference_mode()
def test_unselected_groups_stay_unselected_under_a_negative_bias() -> None:
    layer, x = build(**ROUTINGS["sigmoid with groups"]), tokens(100)
    layer.router.bias.sub_(5.0)  # every score is negative now
    torch.testing.assert_close(layer(x), slow(layer, doubled(layer), x.double()).float())


def test_router_bias_is_a_float32_buffer_in_every_dtype() -> None:
    layer = build(bias=True)
    before = layer.router.bias.clone()
    assert "router.bias" in layer.state_dict()
    assert not any(name.endswith("bias") for name, _ in layer.named_parameters())
    for moved in (layer.bfloat16(), layer.to(torch.float16), layer.double()):
        assert torch.equal(moved.router.bias, before)
        assert moved.router.bias.dtype == torch.float32
    assert layer.router.weight.dtype == torch.float64
    assert layer.to("meta").router.bias.is_meta
    assert build().router.bias is None


def test_router_bias_enters_the_selection_and_optionally_the_weights() -> None:
    x = tokens(4)
    plain, choosing = build(top=1), build(top=1, bias=True)
    both = build(top=1, bias=True, bias_weighs=True)
    scores = plain.router.weight.mul(0)
    for layer in (plain, choosing, both):
        layer.router.weight.data = scores.clone()
    for layer in (choosing, both):
        layer.router.bias.copy_(torch.eye(8)[5])
    assert choosing.router(x)[1].flatten().tolist() == [5] * 4
    assert choosing.router(x)[0].flatten().tolist() == [0.125] * 4
    assert both.router(x)[0].flatten().tolist() == [1.125] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "relu"}, "MoEConfig.score is 'relu', expected 'softmax' or 'sigmoid'"),
        ({"groups": 3}, "MoEConfig.groups is 3, expected a divisor of experts (8)"),
        ({"experts": 0}, "MoEConfig.experts is 0, expected at least 1"),
        ({"inner": 0}, "MoEConfig.inner is 0, expected at least 1"),
        ({"groups": 4, "top_groups": 5}, "MoEConfig.top_groups is 5, expected at most groups (4)"),
        ({"top": 9}, "MoEConfig.top is 9, expected at most the 8 experts of 1 groups"),
        ({"top": 0}, "MoEConfig.top is 0, expected at least 1"),
        (
            {"groups": 4, "top_groups": 1},
            "MoEConfig.top is 3, expected at most the 2 experts of 1 groups",
        ),
    ],
)
def test_invalid_routing_is_rejected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(PLAIN, **changes)


def test_every_field_of_the_routing_is_documented() -> None:
    for field in dataclasses.fields(MoEConfig):
        assert f"        {field.name}: " in MoEConfig.__doc__


@pytest.mark.gpu
@torch.inference_mode()
def test_experts_on_a_gpu_equal_those_on_the_cpu() -> None:
    layer, x = build(64, inner=32, shared=16), tokens(300, 64)
    expected = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected, atol=1e-3, rtol=1e-3)
    half = layer.bfloat16()
    near = half(x.cuda().bfloat16()).float().cpu()
    assert (near - expected).norm() < 0.05 * expected.norm()
