import copy
import io

import pytest
import torch
from torch import nn

from mmdlm.backbones import linear as module
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.backbones.linear import Linear, linear, pack
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.model import MultimodalDLM


def layer(bias: bool = True) -> Linear:
    torch.manual_seed(0)
    return Linear(512, 600, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(512,), (3, 512), (2, 5, 512), (2, 0, 512)])
@pytest.mark.parametrize("rows", [None, slice(0, 512), slice(88, 600), slice(0, 3)])
def test_a_packed_product_is_the_product(bias: bool, shape: tuple, rows: slice | None) -> None:
    of, x = layer(bias), torch.randn(shape)
    want = linear(x, of.weight, of.bias, rows)
    pack(of)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, of.weight, of.bias, rows), want, atol=1e-5, rtol=1e-5)
        spread = torch.randn(4, *shape, 2)[1, ..., 0]  # not one piece of memory
        got = linear(spread, of.weight, of.bias, rows)
    want = linear(spread.contiguous(), of.weight.detach(), of.bias, rows)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_changed_weights_are_packed_anew() -> None:
    of, x = layer(), torch.randn(3, 512)
    pack(of)
    with torch.inference_mode():
        old = of(x)
    with torch.no_grad():
        of.weight.mul_(2)
    with torch.inference_mode():
        torch.testing.assert_close(of(x) - of.bias, 2 * (old - of.bias), atol=1e-4, rtol=1e-4)
    of.load_state_dict(layer().state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(of(x), old)
    of.weight.data = of.weight.data * 3
    with torch.inference_mode():
        torch.testing.assert_close(of(x) - of.bias, 3 * (old - of.bias), atol=1e-4, rtol=1e-4)


def test_only_large_float32_weights_in_inference_are_packed(monkeypatch) -> None:
    used = []
    inner = torch.ops.mkldnn._reorder_linear_weight

    def spy(weight: torch.Tensor) -> torch.Tensor:
        used.append(tuple(weight.shape))
        return inner(weight)

    monkeypatch.setattr(module.torch.ops.mkldnn, "_reorder_linear_weight", spy)
    of, x = layer(), torch.randn(3, 512)
    with torch.inference_mode():
        of(x)
    pack(of)
    of(x).sum().backward()  # training keeps its gradient
    assert of.weight.grad is not None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert of(x).dtype == torch.bfloat16
    half = layer().to(torch.bfloat16)
    small = Linear(8, 8)
    pack(nn.ModuleList([half, small]))
    with torch.inference_mode():
        half(x.bfloat16())
        small(torch.randn(2, 8))
        assert used == []
        of(x)
        of(x)
    assert used == [(600, 512)]


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_decodes_the_same_tokens(tied: bool) -> None:
    sizes = TransformerConfig(vocab=1000, width=512, layers=2, heads=8, inner=700, tied=tied)
    model = MultimodalDLM(Spec("toy", sizes, mask_id=999, eos_id=1, pad_id=0)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
    prompt = torch.randint(2, 999, (2, 9), generator=generator)
    for chosen in ([], [Blocks(4), DualCache()]):
        for weight in model.parameters():
            weight.__dict__.pop("packs", None)
        plain = decode(model, prompt, 8, chosen)
        pack(model.backbone)
        packed = decode(model, prompt, 8, chosen)
        assert any(getattr(weight, "packs", None) for weight in model.parameters())
        assert packed.tokens.equal(plain.tokens)
        assert packed.history.step.equal(plain.history.step)
        torch.testing.assert_close(packed.history.confidence, plain.history.confidence)


def used(of: Linear, x: torch.Tensor) -> Linear:
    """The layer with a packed copy of its weight."""
    pack(of)
    with torch.inference_mode():
        of(x)
    assert of.weight.packs
    return of


def right(of: Linear, x: torch.Tensor) -> bool:
    with torch.inference_mode():
        want = nn.functional.linear(x, of.weight, of.bias)
        return torch.allclose(of(x), want, atol=1e-4, rtol=1e-4)


def test_packed_layers_can_be_copied_and_pickled() -> None:
    x = torch.randn(3, 512)
    of = used(layer(), x)
    file = io.BytesIO()
    torch.save(of, file)
    assert len(file.getvalue()) < 1.1 * of.weight.nbytes  # without the copies
    file.seek(0)
    for other in (copy.deepcopy(of), torch.load(file, weights_only=False)):
        with torch.no_grad():
            other.weight.mul_(2)
        assert right(other, x)
    assert right(of, x)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_fused_optimizers_change_packed_weights(kind: type[torch.optim.Optimizer]) -> None:
    x = torch.randn(3, 512)
    of = used(layer(), x)
    optimizer = kind(of.parameters(), lr=0.1, fused=True)
    of(x).sum().backward()
    optimizer.step()
    assert right(of, x)


def test_packed_weights_may_change_their_type_and_their_memory() -> None:
    x = torch.randn(3, 512)
    of = used(layer(), x)
    of.to(torch.bfloat16).to(torch.float32)  # rounded, and often where they were before
    assert right(of, x)
    for _ in range(20):
        of.weight.data = torch.randn(600, 512)
        assert right(of, x)


def test_weights_made_in_inference_mode_are_not_packed() -> None:
    with torch.inference_mode():
        of = layer()
    pack(of)
    assert right(of, torch.randn(3, 512))


def test_few_parts_of_a_weight_stay_packed() -> None:
    x = torch.randn(3, 512)
    of = used(layer(), x)
    with torch.inference_mode():
        for start in range(20):
            linear(x, of.weight, of.bias, slice(start, 600))
    assert len(of.weight.packs) == module.MOST
