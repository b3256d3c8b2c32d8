import json
import re
import shutil
import time
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


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 10**9},
        {"n_layers": 9_999},
        {"d_model": 2**26, "n_heads": 1},
        {"embedding_size": 2**26},
        {"mlp_hidden_size": 2**26},
        {"n_heads": 0},
        {"n_kv_heads": 0},
        {"d_model": 1e308},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": -1e-6},
        {"rms_norm_eps": 1e-300},
        {"rope_theta": 0},
        {"rope_theta": float("nan")},
        {"rope_theta": 1e308},
        {"rope_theta": 10**400},
        {"max_sequence_length": 0},
        {"mask_token_id": 10**9},
        {"eos_token_id": [1, 10**9]},
        {"input_emb_norm": 1e308},
        {"architectures": 5},
    ],
)
def test_impossible_numbers_are_refused_before_anything_is_built(
    change: dict, published: Callable[..., Path], configure: Callable[..., Path]
) -> None:
    folder = configure(published(), **change)
    start = time.thread_time()
    with pytest.raises(ValueError, match=re.escape(str(folder / "config.json"))):
        load(folder, device="meta")
    assert time.thread_time() - start < 2


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 2**20},
        {"num_experts_per_tok": 10**6},
        {"block_size": -1},
        {"block_size": 1e308},
        {"first_k_dense_replace": 10**9, "num_hidden_layers": 10**10},
        {"moe_intermediate_size": 2**26},
        {"partial_rotary_factor": 1e-300},
        {"routed_scaling_factor": float("nan")},
    ],
)
def test_impossible_experts_are_refused(
    change: dict, published: Callable[..., Path], configure: Callable[..., Path]
) -> None:
    folder = configure(published("llada2_moe"), **change)
    start = time.thread_time()
    with pytest.raises(ValueError, match=re.escape(str(folder / "config.json"))):
        load(folder, device="meta")
    assert time.thread_time() - start < 2


def test_shard_count_in_a_name_is_not_believed(published: Callable[..., Path]) -> None:
    folder = published("dream")
    (folder / "golden.safetensors").unlink()
    (folder / SINGLE).rename(folder / "model-00001-of-999999999.safetensors")
    with pytest.raises(FileNotFoundError, match="1 of 999999999 weight files"):
        load(folder)


@pytest.mark.parametrize("value", [None, [], {}, {"a": 5}, {"a": None}, 7])
def test_weight_map_that_is_not_a_table_is_named(
    value: object, published: Callable[..., Path]
) -> None:
    folder = published()
    (folder / INDEX).write_text(json.dumps({"weight_map": value}))
    with pytest.raises(ValueError, match=r"index.json: weight_map .*expected file names"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tokenizer.json is empty"),
        ('{"version": "1.0", "model', "tokenizer.json is not a valid tokenizer"),
        ("version https://git-lfs.github.com/spec/v1\n", "tokenizer.json is a Git LFS pointer"),
    ],
)
def test_damaged_tokenizer_is_named(
    text: str, message: str, published: Callable[..., Path]
) -> None:
    folder = published()
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_token_without_a_row_is_named(published: Callable[..., Path]) -> None:
    folder = published()
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 10**9}))
    with pytest.raises(ValueError, match=r"'b' has id 1000000000 .* embedding has 160 rows"):
        load(folder)
