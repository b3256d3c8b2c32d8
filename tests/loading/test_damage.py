import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdlm.checkpoint import load
from mmdlm.loading.shards import INDEX, SINGLE


def test_missing_shard_is_named(published: Callable[..., Path]) -> None:
    folder = published()
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 .*missing: model-00002-of-00003"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 6, 100, 5000, -1])
def test_truncated_shard_is_named(keep: int, published: Callable[..., Path]) -> None:
    folder = published()
    file = folder / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model-00003.*not a valid safetensors.*download"):
        load(folder)


def test_git_lfs_pointer_is_named(published: Callable[..., Path]) -> None:
    folder = published("dream")
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer.*git lfs pull"):
        load(folder)


def test_index_of_another_checkpoint_is_named(published: Callable[..., Path]) -> None:
    folder = published()
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.transformer.extra"] = "model-00001-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index names model.transformer.extra"):
        load(folder)
    index["weight_map"] = {"a": "../elsewhere.safetensors"}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected file names"):
        load(folder)


def test_tensor_in_two_shards_is_named(published: Callable[..., Path]) -> None:
    folder = published()
    shutil.copy(
        folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors"
    )
    with pytest.raises(ValueError, match=r"is in model-00001.* and in model-00002"):
        load(folder)


def test_missing_and_unexpected_tensors_are_named(
    published: Callable[..., Path], rewrite: Callable[..., Path]
) -> None:
    lost = "model.layers.1.self_attn.k_proj.bias"

    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {("strange" if k == lost else k): v for k, v in weights.items()}

    folder = rewrite(published("dream"), rename)
    with pytest.raises(ValueError, match=r"1 tensors are missing \(.*k_proj.bias\); 1 .*strange"):
        load(folder)


def test_wrong_shape_is_named(published: Callable[..., Path], rewrite: Callable[..., Path]) -> None:
    def cut(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "model.layers.0.mlp.up_proj.weight"
        return weights | {name: weights[name][:-1].clone()}

    folder = rewrite(published("dream"), cut)
    with pytest.raises(ValueError, match=r"up_proj.weight is \[159, 64\], expected \[160, 64\]"):
        load(folder)


def test_rows_moved_from_queries_to_keys_are_noticed(
    published: Callable[..., Path], rewrite: Callable[..., Path]
) -> None:
    """Both stack to the same fused shape, so only the parts can tell."""

    def move(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        q, k = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")
        rows = torch.cat([weights[q], weights[k]])
        return weights | {q: rows[:48].clone(), k: rows[48:].clone()}

    folder = rewrite(published("dream"), move)
    with pytest.raises(ValueError, match=r"k_proj.weight is \[48, 64\], expected \[32, 64\]"):
        load(folder)


def test_config_with_fewer_layers_is_noticed(
    published: Callable[..., Path], configure: Callable[..., Path]
) -> None:
    folder = configure(published(), n_layers=2)
    with pytest.raises(ValueError, match=r"unexpected \(model.transformer.blocks.2"):
        load(folder)


def test_quantized_tensors_are_refused(
    published: Callable[..., Path], rewrite: Callable[..., Path], configure: Callable[..., Path]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = rewrite(published("dream"), lambda w: w | {name: w[name].char()})
    with pytest.raises(ValueError, match=r"up_proj.weight is I8 \(quantized"):
        load(folder)
    with pytest.raises(ValueError, match="quantized checkpoints are not read"):
        load(configure(folder, quantization_config={"bits": 4}))


def test_pickles_are_not_read(golden: Path, tmp_path: Path) -> None:
    shutil.copy(golden / "backbones/llada/config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin are pickles"):
        load(tmp_path)


def test_config_that_is_missing_or_broken_is_named(published: Callable[..., Path]) -> None:
    folder = published()
    (folder / "config.json").write_text('{"d_model": ')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no config.json, only .*README.md"):
        load(folder)
