"""Heads that config.json ties and the files hold, against transformers 5."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdlm.checkpoint import load
from mmdlm.loading.shards import CHUNK, INDEX, SINGLE, index
from mmdlm.loading.tied import equal

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def qwen3(folder: Path, tied: bool = True) -> Any:
    """Saves a tiny Qwen3 of transformers as an A2D checkpoint and returns its class."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.5,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return Qwen3ForCausalLM


def as_a2d(folder: Path) -> Path:
    """Changes config.json to that of A2D."""
    config = json.loads((folder / "config.json").read_text())
    named = {"model_type": "a2d-qwen3", "architectures": None, "mask_token_id": 3}
    (folder / "config.json").write_text(json.dumps(config | named))
    return folder


def change(folder: Path, case: str) -> None:
    """Rewrites the weights of a tied checkpoint."""
    weights = load_file(folder / SINGLE)
    table = weights[EMBEDDING]
    if case == "only the head":
        weights[HEAD] = weights.pop(EMBEDDING)
    elif case == "equal":
        weights[HEAD] = table.clone()
    elif case == "different":
        weights[HEAD] = table + torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
    elif case == "one number differs":
        weights[HEAD] = table.clone()
        weights[HEAD][-1, -1] += 1
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("case", "is_tied"),
    [
        ("as saved", True),
        ("only the head", True),
        ("equal", True),
        ("different", False),
        ("one number differs", False),
    ],
)
@torch.inference_mode()
def test_stored_head_is_used_as_in_transformers(case: str, is_tied: bool, tmp_path: Path) -> None:
    kind = qwen3(tmp_path)
    change(tmp_path, case)
    theirs = kind.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ours = load(as_a2d(tmp_path))
    told = [str(w.message) for w in seen if "ties the head" in str(w.message)]
    expected = theirs(input_ids=IDS, attention_mask=torch.zeros(1, 1, 6, 6)).logits
    torch.testing.assert_close(ours.logits(IDS), expected, atol=1e-4, rtol=0)
    assert ours.spec.transformer.tied is is_tied
    assert len(told) == (not is_tied)


@pytest.mark.parametrize("tied", [True, False])
def test_index_may_name_a_head_that_is_tied(tied: bool, tmp_path: Path) -> None:
    qwen3(tmp_path)
    as_a2d(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    names = [*load_file(tmp_path / SINGLE), HEAD]
    shard = "model-00001-of-00001.safetensors"
    (tmp_path / SINGLE).rename(tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    if tied:
        assert load(tmp_path).spec.transformer.tied
    else:
        with pytest.raises(ValueError, match=r"1 tensors are missing \(lm_head.weight\)"):
            load(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.norm.bias", "model.layers.0.lm_head.bias", EMBEDDING + "2"]
)
def test_index_may_not_name_other_tensors_that_are_missing(name: str, tmp_path: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    save_file({"a": torch.ones(2)}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard, name: shard}}))
    with pytest.raises(ValueError, match=f"the index names {name}, which"):
        index(tmp_path)


def test_values_are_compared_beyond_the_first_chunk(tmp_path: Path) -> None:
    count = CHUNK // 4 + 3
    long = torch.arange(count, dtype=torch.float32) % 7
    other = long.clone()
    other[-1] += 1
    save_file({"a": long, "b": long.clone(), "c": other, "d": long.bfloat16()}, tmp_path / SINGLE)
    stored = index(tmp_path)
    assert equal(stored["a"], stored["b"])
    assert not equal(stored["a"], stored["c"])
    assert equal(stored["a"], stored["d"])  # these numbers are exact in bfloat16
