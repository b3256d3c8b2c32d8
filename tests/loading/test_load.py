import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmdlm
import mmdlm.files
from mmdlm.backbones.family import Family
from mmdlm.checkpoint import load, save, save_published
from mmdlm.loading.keymap import Report
from mmdlm.loading.shards import INDEX, SINGLE
from mmdlm.text import Tokenizer

FAMILIES = ("llada", "dream")


class _WithRouter(Family):
    FLOAT32 = ("norm.weight",)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_folder_loads_in_full(
    golden: Path, family: str, weights_of: Callable[[Path], dict[str, Tensor]]
) -> None:
    folder = golden / "backbones" / family
    model = load(folder)
    assert model.spec.family == family
    assert not model.training
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert set(model.report.loaded) == set(weights_of(folder))
    assert model.report == Report(tuple(sorted(weights_of(folder))))
    assert model.tokenizer is None
    assert not any(t.is_meta for t in model.state_dict().values())


def test_path_and_string_and_public_name_are_the_same(
    golden: Path, same: Callable[[nn.Module, nn.Module], bool]
) -> None:
    folder = golden / "backbones" / "llada"
    assert same(load(folder), mmdlm.load(str(folder)))


def test_sharded_folder_equals_single_file(
    golden: Path,
    published: Callable[..., Path],
    rewrite: Callable[..., Path],
    same: Callable[[nn.Module, nn.Module], bool],
) -> None:
    sharded = load(golden / "backbones" / "llada")
    folder = rewrite(published())
    assert not (folder / INDEX).exists()
    assert same(load(folder), sharded)


def test_shards_without_an_index_load_when_complete(
    golden: Path, published: Callable[..., Path], same: Callable[[nn.Module, nn.Module], bool]
) -> None:
    folder = published()
    (folder / INDEX).unlink()
    (folder / "golden.safetensors").unlink()
    assert same(load(folder), load(golden / "backbones" / "llada"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 weight files are missing: model-00002"):
        load(folder)


@pytest.mark.parametrize("prefix", ["model.", "language_model.", "llm_model.", "a.b.model."])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_of_a_wrapper_is_stripped(
    golden: Path,
    family: str,
    prefix: str,
    published: Callable[..., Path],
    rewrite: Callable[..., Path],
    same: Callable[[nn.Module, nn.Module], bool],
) -> None:
    folder = rewrite(published(family), lambda w: {prefix + k: v for k, v in w.items()})
    model = load(folder)
    assert model.report.prefix == prefix
    assert same(model, load(golden / "backbones" / family))


def test_head_may_stand_outside_of_the_prefix(
    golden: Path,
    published: Callable[..., Path],
    rewrite: Callable[..., Path],
    same: Callable[[nn.Module, nn.Module], bool],
) -> None:
    def wrap(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k if k == "lm_head.weight" else f"model.{k}": v for k, v in weights.items()}

    folder = rewrite(published("dream"), wrap)
    assert same(load(folder), load(golden / "backbones" / "dream"))


def test_two_language_models_in_one_folder_are_refused(
    published: Callable[..., Path], rewrite: Callable[..., Path]
) -> None:
    folder = rewrite(
        published("dream"),
        lambda w: w | {f"draft.{k}": v.clone() for k, v in w.items()},
    )
    with pytest.raises(ValueError, match=r"several prefixes, \['', 'draft.'\]"):
        load(folder)


@pytest.mark.parametrize(
    "table",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
    ],
)
def test_rotary_tables_of_resaved_files_are_ignored(
    golden: Path,
    table: str,
    published: Callable[..., Path],
    rewrite: Callable[..., Path],
    same: Callable[[nn.Module, nn.Module], bool],
) -> None:
    folder = rewrite(published("dream"), lambda w: w | {table: torch.ones(8)})
    model = load(folder)
    assert model.report.ignored == {table: "rotary table, computed from config.json"}
    assert same(model, load(golden / "backbones" / "dream"))


@pytest.mark.parametrize(
    ("family", "flag", "head", "embedding"),
    [
        ("dream", "tie_word_embeddings", "lm_head.weight", "model.embed_tokens.weight"),
        (
            "llada",
            "weight_tying",
            "model.transformer.ff_out.weight",
            "model.transformer.wte.weight",
        ),
    ],
)
@torch.inference_mode()
def test_tied_head_that_is_stored_as_well(
    family: str,
    flag: str,
    head: str,
    embedding: str,
    tmp_path: Path,
    published: Callable[..., Path],
    rewrite: Callable[..., Path],
    configure: Callable[..., Path],
) -> None:
    ids = torch.arange(12)[None]
    expected = load(published(family)).logits(ids)
    folder = configure(rewrite(tmp_path / family), **{flag: True})
    with pytest.warns(UserWarning, match=f"{head} and {embedding} have different values"):
        both = load(folder)
    assert not both.spec.transformer.tied
    assert torch.equal(both.logits(ids), expected)
    again = json.loads((folder / "config.json").read_text())
    save_published(both, tmp_path / "out")
    assert again[flag] is True
    assert json.loads((tmp_path / "out" / "config.json").read_text())[flag] is False

    equal = load(rewrite(folder, lambda w: w | {head: w[embedding].clone()}))
    assert "equal" in equal.report.ignored[head]
    without = load(rewrite(folder, lambda w: {k: v for k, v in w.items() if k != head}))
    assert without.report.ignored == {}
    only = load(rewrite(folder, lambda w: {head if k == embedding else k: w[k] for k in w}))
    assert torch.equal(equal.logits(ids), without.logits(ids))
    assert torch.equal(only.logits(ids), without.logits(ids))
    assert equal.spec.transformer.tied
    assert without.spec.transformer.tied


def test_bfloat16_checkpoint_is_read_exactly(
    published: Callable[..., Path],
    rewrite: Callable[..., Path],
    same: Callable[[nn.Module, nn.Module], bool],
) -> None:
    folder = rewrite(published(), lambda w: {k: v.bfloat16() for k, v in w.items()})
    exact, half = load(folder), load(folder, dtype="bfloat16")
    assert (exact.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert same(exact, half.float())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.float16])
@torch.inference_mode()
def test_half_precision_model_runs(golden: Path, dtype: str | torch.dtype) -> None:
    for family in FAMILIES:
        folder = golden / "backbones" / family
        ids = load_file(folder / "golden.safetensors")["input_ids"]
        half, exact = load(folder, dtype=dtype).logits(ids), load(folder).logits(ids)
        assert half.isfinite().all()
        assert (half.argmax(-1) == exact.argmax(-1)).float().mean() >= 0.9


def test_loading_neither_draws_nor_copies_the_backbone(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, allocated = [], []
    for name in ("normal_", "kaiming_uniform_", "uniform_"):
        real = getattr(nn.init, name)

        def watch(tensor: Tensor, *args: Any, real: Any = real, **kwargs: Any) -> Tensor:
            drawn.append(tensor.is_meta)
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(nn.init, name, watch)
    empty = torch.empty

    def count(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        allocated.append(0 if made.is_meta else made.numel())
        return made

    monkeypatch.setattr(torch, "empty", count)
    before = torch.random.get_rng_state()
    model = load(golden / "backbones" / "llada")
    assert all(drawn)
    assert sum(allocated) == sum(p.numel() for p in model.parameters())
    assert torch.equal(before, torch.random.get_rng_state())


def test_tensors_that_must_stay_float32_do(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmdlm.backbones.dream import Dream

    monkeypatch.setattr(Dream, "FLOAT32", _WithRouter.FLOAT32)
    model = load(golden / "backbones" / "dream", dtype="bfloat16")
    types = {name: p.dtype for name, p in model.backbone.named_parameters()}
    assert all((t == torch.float32) == n.endswith("norm.weight") for n, t in types.items())
    save(load(golden / "backbones" / "dream"), tmp_path / "own", dtype="bfloat16")
    save_published(load(golden / "backbones" / "dream"), tmp_path / "out", dtype="bfloat16")
    assert load_file(tmp_path / "own" / SINGLE)["backbone.norm.weight"].dtype == torch.float32
    stored = load_file(tmp_path / "out" / SINGLE)
    assert stored["model.norm.weight"].dtype == torch.float32
    assert stored["lm_head.weight"].dtype == torch.bfloat16


def test_device_and_dtype_are_checked(golden: Path) -> None:
    folder = golden / "backbones" / "llada"
    with pytest.raises(ValueError, match="dtype='int8', expected auto, stored, float32"):
        load(folder, dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no GPU"):
            load(folder, device="cuda")


@pytest.mark.gpu
def test_automatic_choice_on_a_gpu_is_the_type_of_the_checkpoint(
    golden: Path, published: Callable[..., Path], rewrite: Callable[..., Path]
) -> None:
    folder = rewrite(published(), lambda w: {k: v.bfloat16() for k, v in w.items()})
    model = load(folder)
    assert (model.device.type, model.dtype) == ("cuda", torch.bfloat16)
    assert load(golden / "backbones" / "llada").dtype == torch.float32


def test_tokenizer_of_another_checkpoint_is_refused(published: Callable[..., Path]) -> None:
    folder = published()
    Tokenizer.from_words([f"w{i}" for i in range(200)]).save(folder)
    with pytest.raises(ValueError, match="tokenizer.json has 203 tokens, the embedding 160 rows"):
        load(folder)


def test_tensors_of_one_layer_may_be_spread_over_shards(
    golden: Path, published: Callable[..., Path], same: Callable[[nn.Module, nn.Module], bool]
) -> None:
    folder = published("dream")
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    where = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        part = {name: weights[name] for name in sorted(weights)[i::3]}
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    # Neither every index has metadata, nor every file.
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    assert same(load(folder), load(golden / "backbones" / "dream"))


def test_single_file_comes_before_shards_beside_it(
    golden: Path,
    published: Callable[..., Path],
    weights_of: Callable[[Path], dict[str, Tensor]],
    same: Callable[[nn.Module, nn.Module], bool],
) -> None:
    folder = published()
    save_file(weights_of(folder), folder / SINGLE)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert same(load(folder), load(golden / "backbones" / "llada"))


def test_float16_checkpoint_is_read_exactly(
    published: Callable[..., Path],
    rewrite: Callable[..., Path],
    same: Callable[[nn.Module, nn.Module], bool],
) -> None:
    folder = rewrite(published(), lambda w: {k: v.half() for k, v in w.items()})
    exact, half = load(folder), load(folder, dtype="stored")
    assert (exact.dtype, half.dtype) == (torch.float32, torch.float16)
    assert same(exact, half.float())


def test_model_without_memory_is_not_read(golden: Path) -> None:
    model = load(golden / "backbones" / "llada", device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert len(model.report.loaded) == 30
