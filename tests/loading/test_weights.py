from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mmdlm
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.transformer import Transformer
from mmdlm.checkpoint import load
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.loading.weights import devices, spread

CPU, META = torch.device("cpu"), torch.device("meta")
GPUS = [torch.device(f"cuda:{i}") for i in range(4)]


def backbone(layers: int, vocab: int = 8) -> Transformer:
    with torch.device("meta"):
        return Transformer(
            TransformerConfig(vocab=vocab, width=8, layers=layers, heads=2, inner=16)
        )


def runs(layers: int, over: int, vocab: int = 8) -> list[int]:
    """Blocks per device, in order."""
    places = spread(backbone(layers, vocab), GPUS[:over])
    order = [places[f"blocks.{i}"].index for i in range(layers)]
    assert order == sorted(order)
    return [order.count(i) for i in range(over)]


def test_blocks_are_shared_in_runs_of_equal_size() -> None:
    assert runs(8, 1) == [8]
    assert runs(8, 2) == [4, 4]
    assert runs(8, 4) == [2, 2, 2, 2]
    assert runs(3, 2) in ([1, 2], [2, 1])
    assert runs(4, 4) == [1, 1, 1, 1]


def test_device_with_embedding_and_head_takes_fewer_blocks() -> None:
    one_block = sum(p.numel() for p in backbone(1).blocks.parameters())
    rows = 2 * one_block // 8 // 2  # embedding and head together weigh two blocks
    assert runs(6, 2, rows) == [2, 4]
    assert runs(6, 3, 100 * rows) == [1, 1, 4]
    places = spread(backbone(6), GPUS[:2])
    assert {name: places[name].index for name in ("embed", "out", "norm")} == {
        "embed": 0,
        "out": 0,
        "norm": 1,
    }


def test_devices_that_are_none_are_named(golden: Path) -> None:
    with pytest.raises(ValueError, match="device names 4 devices for 2 blocks"):
        spread(backbone(2), GPUS)
    with pytest.raises(ValueError, match=r"device=\[\] names no device"):
        load(golden / "backbones" / "llada", device=[])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda:1', but torch finds no GPU"):
            devices(["cpu", "cuda:1"])


@torch.inference_mode()
def test_model_over_two_devices_says_the_same(
    golden: Path, same: Callable[[nn.Module, nn.Module], bool]
) -> None:
    folder = golden / "backbones" / "llada"
    one, two = load(folder, device="cpu"), load(folder, device=["cpu", "cpu"])
    assert same(one, two)
    prompt = torch.arange(6).view(2, 3)
    steps = (Blocks(4), TopK(2), PrefixCache())
    first, second = (mmdlm.decode(model, prompt, 8, steps) for model in (one, two))
    assert torch.equal(first.tokens, second.tokens)


@torch.inference_mode()
def test_everything_moves_with_the_blocks(golden: Path) -> None:
    """The meta device stands for a second one: it refuses tensors of the CPU."""
    model = load(golden / "backbones" / "llada", device=[CPU, META])
    where = [block.attn.o.weight.device for block in model.backbone.blocks]
    split = where.index(META)
    assert 0 < split < len(where)
    assert where == [CPU] * split + [META] * (len(where) - split)
    assert model.backbone.out.weight.device == model.device == CPU
    kv = model.backbone.cache(2, 6)
    assert [k.device for k in kv.keys] == [v.device for v in kv.values] == where
    seen = []

    def back(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        seen.append(output.device)
        return torch.zeros(output.shape)  # values on the meta device cannot be brought back

    model.backbone.norm.register_forward_hook(back)
    x = model.backbone.tokens(torch.zeros(2, 6, dtype=torch.long))
    positions, mask = torch.arange(6).expand(2, -1), torch.ones(2, 6, 6, dtype=torch.bool)
    read = torch.tensor([[1, 2], [3, 4]])
    hidden = model.backbone(x, positions, kv, mask, rows=positions, read=read)
    assert (hidden.shape, hidden.device, seen) == ((2, 2, 64), CPU, [META])
    kv.keep(torch.tensor([1]))
    assert [k.device for k in kv.keys] == where


@pytest.mark.gpu
@torch.inference_mode()
def test_model_over_gpu_and_cpu_says_the_same(golden: Path) -> None:
    folder = golden / "backbones" / "llada"
    prompt = torch.arange(6).view(2, 3)
    steps = (Blocks(4), TopK(2), PrefixCache())
    one = mmdlm.decode(load(folder, device="cpu"), prompt, 8, steps).tokens
    for over in (["cuda:0", "cpu"], ["cpu", "cuda:0"]):
        split = load(folder, device=over, dtype="float32")
        assert torch.equal(mmdlm.decode(split, prompt, 8, steps).tokens.cpu(), one)
