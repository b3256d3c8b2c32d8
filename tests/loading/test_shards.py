import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdlm.loading import shards
from mmdlm.loading.shards import INDEX, SINGLE, copy, index, write

MIXED = {
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(7).bfloat16(),
    "single": torch.randn(2, 3, 4),
    "double": torch.randn(4).double(),
    "whole": torch.arange(6).view(2, 3),
    "small": torch.arange(5, dtype=torch.int32),
    "byte": torch.arange(5, dtype=torch.uint8),
    "yes": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4),
}


def types(tensors: dict[str, Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}


def test_index_reads_headers(golden: Path) -> None:
    stored = index(golden / "backbones" / "llada")
    assert stored["model.transformer.wte.weight"].shape == (160, 64)
    assert stored["model.transformer.wte.weight"].dtype == "F32"
    assert len({s.file for s in stored.values()}) == 3


@pytest.mark.parametrize("shard_bytes", [5e9, 64])
def test_tensors_of_every_type_come_back_as_they_were(tmp_path: Path, shard_bytes: float) -> None:
    write(tmp_path, MIXED, types(MIXED), shard_bytes)
    assert (tmp_path / INDEX).exists() == (shard_bytes == 64)
    targets = {name: torch.empty_like(tensor) for name, tensor in MIXED.items()}
    copy(index(tmp_path), targets)
    for name, tensor in MIXED.items():
        assert torch.equal(targets[name], tensor), name


@pytest.mark.parametrize("chunk", [8, 24, 2**20])
def test_tensors_are_cast_chunk_by_chunk(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK", chunk)
    save_file(MIXED, tmp_path / SINGLE)
    wanted = {name: torch.float64 for name in MIXED} | {"half": torch.bfloat16}
    targets = {n: torch.empty(t.shape, dtype=wanted[n]) for n, t in MIXED.items()}
    copy(index(tmp_path), targets)
    for name, tensor in MIXED.items():
        assert torch.equal(targets[name], tensor.to(wanted[name])), name


def test_rows_of_a_larger_tensor_are_filled_alone(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.full((1, 3), 2.0)}, tmp_path / SINGLE)
    fused = torch.zeros(4, 3)
    copy(index(tmp_path), {"a": fused[:2], "b": fused[3:]})
    assert fused[:, 0].tolist() == [1, 1, 0, 2]


def test_targets_without_memory_are_skipped(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / SINGLE)
    target = torch.zeros(2)
    copy(index(tmp_path), {"a": torch.empty(2, device="meta"), "b": target})
    assert target.tolist() == [1, 1]


def test_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / SINGLE)
    stored = index(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors ends early"):
        copy(stored, {"a": torch.empty(100)})


def test_type_that_torch_and_we_do_not_share_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match="a is F8_E4M3, expected"):
        copy(index(tmp_path), {"a": torch.empty(4)})


def test_index_lists_every_tensor_and_the_size(tmp_path: Path) -> None:
    write(tmp_path, MIXED, types(MIXED), shard_bytes=64)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in MIXED.values())
    held = {name: f.name for f in tmp_path.glob("model-*") for name in load_file(f)}
    assert index["weight_map"] == held
