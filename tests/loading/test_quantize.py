"""Rounded weights; torchao is an extra (mmdlm[quant])."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mmdlm
from mmdlm import checkpoint
from mmdlm.checkpoint import load, save, save_published
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.layout import from_tokens
from mmdlm.loading import weights
from mmdlm.loading.quantize import is_quantized

KINDS = ("int8", "int4")
# Least share of positions whose best token stays the same; measured 1.0 and 0.88 on these weights,
# which are random and so harder to round than trained ones.
AGREEMENT = {"int8": 0.9, "int4": 0.8}


@pytest.fixture
def llada(golden: Path) -> Path:
    pytest.importorskip("torchao", reason='needs torchao: pip install "mmdlm[quant]"')
    return golden / "backbones" / "llada"


def held(weight: Tensor) -> int:
    """Bytes of a weight; torchao's own `nbytes` counts those of the float it stands for."""
    if not hasattr(weight, "__tensor_flatten__") or type(weight) is nn.Parameter:
        return weight.nbytes
    return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])


def linears(model: nn.Module) -> list[nn.Linear]:
    return [part for part in model.backbone.blocks.modules() if isinstance(part, nn.Linear)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_quantized_model_agrees_with_the_full_one(llada: Path, kind: str, dtype: str) -> None:
    ids = load_file(llada / "golden.safetensors")["input_ids"]
    full, quantized = load(llada, dtype=dtype), load(llada, dtype=dtype, quantize=kind)
    first, second = full.logits(ids), quantized.logits(ids)
    agreement = (first.argmax(-1) == second.argmax(-1)).float().mean()
    assert agreement >= AGREEMENT[kind]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_layers_are_smaller_and_the_rest_is_untouched(llada: Path, kind: str) -> None:
    full, quantized = load(llada, dtype="bfloat16"), load(llada, dtype="bfloat16", quantize=kind)
    before = sum(held(layer.weight) for layer in linears(full))
    after = sum(held(layer.weight) for layer in linears(quantized))
    # Scales and zero points weigh much in rows of 64.
    assert after < {"int8": 0.6, "int4": 0.4}[kind] * before
    assert is_quantized(quantized)
    assert not is_quantized(full)
    first, second = full.state_dict(), quantized.state_dict()
    assert first.keys() == second.keys()
    layers = tuple(f".{part}.weight" for part in ("qkv", "o", "gate_up", "down"))
    for name in first:
        if not name.endswith(layers):
            assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_reading_a_few_rows_of_a_quantized_model_equals_reading_all(llada: Path, kind: str) -> None:
    model = load(llada, quantize=kind)
    tokens = torch.arange(20).view(2, 10)
    sequence = from_tokens(tokens, None, "full", None)
    part = model.run(sequence, slice(0, 10), slice(4, 7), model.backbone.cache(2, 10))
    torch.testing.assert_close(part, model.logits(tokens)[:, 4:7], atol=1e-4, rtol=1e-4)
    ids = slice(30, 50)
    some = model.run(sequence, slice(0, 10), slice(4, 7), None, ids)
    torch.testing.assert_close(some, part[..., ids], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_model_decodes(llada: Path, kind: str) -> None:
    model = load(llada, dtype="bfloat16", quantize=kind)
    prompt = torch.arange(8).view(2, 4)
    tokens = mmdlm.decode(model, prompt, 8, (Blocks(4), TopK(2), DualCache())).tokens
    assert torch.equal(tokens[:, :4], prompt)
    assert not (tokens == model.spec.mask_id).any()


def test_full_weights_are_there_for_one_block_at_a_time(
    llada: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: list[int] = []
    real, built = weights.quantize_block, []

    def watch(block: nn.Module, kind: str) -> None:
        layers = [layer.weight for layer in linears(built[0])]
        real_ones = [w for w in layers if type(w) is nn.Parameter and not w.is_meta]
        full.append(len(real_ones))
        real(block, kind)

    fill = checkpoint.fill
    monkeypatch.setattr(weights, "quantize_block", watch)
    monkeypatch.setattr(
        checkpoint, "fill", lambda model, *args: (built.append(model), fill(model, *args))
    )
    load(llada, quantize="int8")
    assert full == [4] * len(built[0].backbone.blocks)


def test_quantized_model_is_not_saved(llada: Path, tmp_path: Path) -> None:
    model = load(llada, quantize="int8")
    for write in (save, save_published):
        with pytest.raises(ValueError, match="quantized weights cannot be saved; load .* without"):
            write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llada", {"quantize": "int2"}, "quantize='int2', expected 'int8' or 'int4'"),
        ("llada2_moe", {"quantize": "int8"}, "nearly all weights of llada2_moe are experts"),
    ],
)
def test_quantizing_that_cannot_be_done_is_refused(
    golden: Path, llada: Path, family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(golden / "backbones" / family, **options)


def test_rows_that_are_no_whole_groups_are_refused(
    tmp_path: Path, llada: Path, multimodal: Callable[[], Any]
) -> None:
    save(multimodal(), tmp_path)
    with pytest.raises(
        ValueError, match=r"qkv has 16 inputs, which is not a multiple of 32; use int8"
    ):
        load(tmp_path, quantize="int4")
    assert is_quantized(load(tmp_path, quantize="int8").backbone)


def test_without_torchao_the_extra_is_named(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'needs torchao: pip install "mmdlm\[quant\]"'):
        load(golden / "backbones" / "llada", quantize="int8")
