import copy
import io
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmdlm.backbones import linear as module
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.backbones.linear import Linear, linear, pack, packed
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.model import MultimodalDLM


def layer(bias: bool = True, width: int = 512) -> Linear:
    torch.manual_seed(0)
    return Linear(width, 600, bias=bias)


@torch.inference_mode()
def run(of: Linear, x: Tensor, rows: slice | None = None) -> Tensor:
    with packed(of):
        return linear(x, of.weight, of.bias, rows)


def used(of: Linear, x: Tensor) -> Linear:
    """The layer with a packed copy of its weight."""
    pack(of)
    run(of, x)
    assert of.weight.packs.copies
    return of


def is_right(of: Linear, x: Tensor) -> bool:
    with torch.inference_mode():
        want = nn.functional.linear(x, of.weight, of.bias)
    return torch.allclose(run(of, x), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(512,), (3, 512), (2, 5, 512), (2, 0, 512)])
@pytest.mark.parametrize("rows", [None, slice(0, 512), slice(88, 600), slice(0, 3)])
def test_packed_product_equals_the_product(bias: bool, shape: tuple, rows: slice | None) -> None:
    of, x = layer(bias), torch.randn(shape)
    want = linear(x, of.weight, of.bias, rows)
    pack(of)
    torch.testing.assert_close(run(of, x, rows), want, atol=1e-5, rtol=1e-5)
    strided = torch.randn(4, *shape, 2)[1, ..., 0]
    want = linear(strided.contiguous(), of.weight.detach(), of.bias, rows)
    torch.testing.assert_close(run(of, strided, rows), want, atol=1e-5, rtol=1e-5)


def add_to_data(weight: Tensor) -> None:
    weight.data += 1


def add_in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight.add_(1)


def change_one_bit(weight: Tensor) -> None:
    weight.data.view(torch.int32)[-1, -1] += 1


def change_through_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[5, 7] = 3.0


def permute_rows(weight: Tensor) -> None:
    weight.data.copy_(weight.data.flip(0).clone())


def permute_columns(weight: Tensor) -> None:
    weight.data.copy_(weight.data.roll(256, 1).clone())


def swap_neighbours_in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight[:, :2] = weight[:, :2].flip(1)


def replace_data(weight: Tensor) -> None:
    weight.data = weight.data * 3


def negate_some_rows(weight: Tensor) -> None:
    weight.data[3:9].neg_()


@pytest.mark.parametrize("width", [512, 515])
@pytest.mark.parametrize(
    "change",
    [
        add_to_data,
        add_in_place,
        change_one_bit,
        change_through_numpy,
        permute_rows,
        permute_columns,
        swap_neighbours_in_place,
        replace_data,
        negate_some_rows,
    ],
)
def test_next_use_after_a_change_packs_the_new_weight(
    change: Callable[[Tensor], None], width: int
) -> None:
    x = torch.eye(width)
    of = used(layer(width=width), x)
    old = of.weight.detach().clone()
    change(of.weight)
    assert not of.weight.equal(old)
    assert run(of, x).sub(of.bias).T.sub(of.weight).abs().max() < 1e-6


def test_unchanged_weights_stay_packed() -> None:
    x = torch.randn(3, 512)
    of = used(layer(), x)
    before = of.weight.packs.copies[None]
    run(of, x)
    assert of.weight.packs.copies[None] is before


def test_decode_after_a_merge_into_the_data_uses_the_new_weights() -> None:
    model, prompt = model_of(tied=False), torch.tensor([[5, 6, 7]])
    pack(model.backbone)
    old = decode(model, prompt, 8, [Blocks(4), DualCache()])
    for block in model.backbone.blocks:
        block.mlp.down.weight.data += 0.5 * block.mlp.down.weight.data.flip(0)
    fresh = copy.deepcopy(model)  # copies are not packed
    new = decode(model, prompt, 8, [Blocks(4), DualCache()])
    want = decode(fresh, prompt, 8, [Blocks(4), DualCache()])
    assert new.tokens.equal(want.tokens)
    assert not new.history.confidence.allclose(old.history.confidence)
    torch.testing.assert_close(new.history.confidence, want.history.confidence)


def test_only_large_float32_weights_in_inference_are_packed(monkeypatch) -> None:
    shapes = []
    inner = torch.ops.mkldnn._reorder_linear_weight

    def spy(weight: Tensor) -> Tensor:
        shapes.append(tuple(weight.shape))
        return inner(weight)

    monkeypatch.setattr(module.torch.ops.mkldnn, "_reorder_linear_weight", spy)
    of, x = layer(), torch.randn(3, 512)
    run(of, x)
    pack(of)
    with torch.inference_mode():
        of(x)  # outside of `packed`
    with packed(of):
        of(x).sum().backward()  # training keeps its gradient
    assert of.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert run(of, x).dtype == torch.bfloat16
    half = layer().to(torch.bfloat16)
    small = Linear(8, 8)
    pack(nn.ModuleList([half, small]))
    run(half, x.bfloat16())
    run(small, torch.randn(2, 8))
    assert shapes == []
    run(of, x)
    run(of, x)
    assert shapes == [(600, 512)]


def test_context_of_another_module_or_thread_does_not_use_the_copies() -> None:
    x = torch.randn(3, 512)
    of, other = used(layer(), x), layer()
    of.weight.data += 1
    with torch.inference_mode():
        want = nn.functional.linear(x, of.weight, of.bias)
        with packed(other):
            torch.testing.assert_close(of(x), want)
        results: list[Tensor] = []

        def compute() -> None:
            with torch.inference_mode():
                results.append(of(x))

        old = of.weight.packs.copies[None]
        with packed(other):
            thread = threading.Thread(target=compute)
            thread.start()
            thread.join()
        torch.testing.assert_close(results[0], want)
        assert of.weight.packs.copies[None] is old


def model_of(tied: bool) -> MultimodalDLM:
    sizes = TransformerConfig(vocab=1000, width=512, layers=2, heads=8, inner=700, tied=tied)
    model = MultimodalDLM(Spec("toy", sizes, mask_id=999, eos_id=1, pad_id=0)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_packed_model_decodes_the_same_tokens(tied: bool) -> None:
    model = model_of(tied)
    prompt = torch.randint(2, 999, (2, 9), generator=torch.Generator().manual_seed(0))
    for chosen in ([], [Blocks(4), DualCache()]):
        for weight in model.parameters():
            weight.__dict__.pop("packs", None)
        plain = decode(model, prompt, 8, chosen)
        pack(model.backbone)
        fast = decode(model, prompt, 8, chosen)
        packs = [weight.packs for weight in model.parameters() if hasattr(weight, "packs")]
        assert any(each.copies for each in packs)
        assert fast.tokens.equal(plain.tokens)
        assert fast.history.step.equal(plain.history.step)
        torch.testing.assert_close(fast.history.confidence, plain.history.confidence)


def test_packed_layers_can_be_copied_and_pickled() -> None:
    x = torch.randn(3, 512)
    of = used(layer(), x)
    file = io.BytesIO()
    torch.save(of, file)
    assert len(file.getvalue()) < 1.1 * of.weight.nbytes  # without the copies
    file.seek(0)
    for other in (copy.deepcopy(of), torch.load(file, weights_only=False)):
        add_to_data(other.weight)
        assert is_right(other, x)
    assert is_right(of, x)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_fused_optimizers_change_packed_weights(kind: type[torch.optim.Optimizer]) -> None:
    x = torch.randn(3, 512)
    of = used(layer(), x)
    optimizer = kind(of.parameters(), lr=0.1, fused=True)
    of(x).sum().backward()
    optimizer.step()
    assert is_right(of, x)


def test_packed_weights_may_change_their_dtype_and_their_storage() -> None:
    x = torch.randn(3, 512)
    of = used(layer(), x)
    of.to(torch.bfloat16)
    assert run(of, x.bfloat16()).dtype == torch.bfloat16
    of.to(torch.float32)
    assert is_right(of, x)
    for _ in range(20):
        of.weight.data = torch.randn(600, 512)
        assert is_right(of, x)
    of.weight.data = torch.randn(512, 600).T
    assert is_right(of, x)


def test_weights_made_in_inference_mode_may_change() -> None:
    x = torch.randn(3, 512)
    with torch.inference_mode():
        of = used(layer(), x)
        of.weight.mul_(2)
    assert is_right(of, x)


def test_number_of_packed_slices_is_bounded() -> None:
    x = torch.randn(3, 512)
    of = used(layer(), x)
    for start in range(20):
        run(of, x, slice(start, 600))
    assert list(of.weight.packs.copies) == [(start, 600) for start in range(16, 20)]
    assert len(of.weight.packs.copies) == module.MOST
