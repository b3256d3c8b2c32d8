import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmdlm
from adapters.action_bins import ActionBins
from adapters.mlp import MLP
from adapters.normalize import Normalizer
from adapters.pool import Pool
from adapters.robot import Robot
from encoders.state import StateEncoder
from encoders.vit import ViT
from encoders.whisper import WhisperEncoder
from mmdlm import checkpoint, preset
from mmdlm.backbones.family import Family, Spec
from mmdlm.backbones.transformer import TransformerConfig
from mmdlm.checkpoint import load, save, save_published
from mmdlm.decoding.blocks import Blocks
from mmdlm.decoding.threshold import Threshold
from mmdlm.keymap import Report, expand, prefix_of, resolve
from mmdlm.model import MultimodalDLM
from mmdlm.shards import SINGLE, Stored, survey
from mmdlm.text import Tokenizer

INDEX = "model.safetensors.index.json"
FAMILIES = ("llada", "dream")
STATISTICS = {"q01": [-1.0, 0.0], "q99": [1.0, 2.0], "min": [-2.0, -1.0], "max": [2.0, 3.0]}


def published(golden: Path, folder: Path, family: str = "llada") -> Path:
    return Path(shutil.copytree(golden / "backbones" / family, folder / family))


def weights_of(folder: Path) -> dict[str, Tensor]:
    names = [f for f in folder.glob("model*.safetensors")]
    return {k: v for f in names for k, v in load_file(f).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """One file instead of the shards, with its tensors changed."""
    weights = change(weights_of(folder))
    for file in [*folder.glob("model-*"), folder / INDEX]:
        file.unlink(missing_ok=True)
    save_file(weights, folder / SINGLE)
    return folder


def configure(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {k: v for k, v in config.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def multimodal() -> MultimodalDLM:
    tokenizer = Tokenizer.from_words(["what", "is", "this", "?"], actions=8)
    spec = Spec(
        family="llada",
        transformer=TransformerConfig(
            vocab=len(tokenizer), width=16, layers=2, heads=2, inner=24, theta=123.25
        ),
        mask_id=2,
        eos_id=1,
        pad_id=0,
        stop_ids=(5,),
        attention="cascade",
        block_size=4,
    )
    normalizer = Normalizer(STATISTICS)
    robot = Robot(ActionBins(8, last_id=len(tokenizer) - 1), normalizer, normalizer, chunk=2)
    encoders = {"image": ViT.tiny(), "audio": WhisperEncoder.tiny(), "state": StateEncoder.tiny()}
    adapters = {"image": Pool(32, 16), "audio": MLP(64, 16), "state": MLP(32, 16, layers=1)}
    model = MultimodalDLM(spec, encoders, adapters, tokenizer, robot)
    model.backbone.reset(torch.Generator().manual_seed(0))
    model.preset = {
        "caption": {
            "prompt": "a b",
            "length": 8,
            "strategies": [preset.recipe(Blocks(4)), preset.recipe(Threshold(0.75))],
        },
        "act": {"execute": 4},
    }
    return model.eval()


# Published layouts


@pytest.mark.parametrize("family", FAMILIES)
def test_published_folder_loads_in_full(golden: Path, family: str) -> None:
    folder = golden / "backbones" / family
    model = load(folder)
    assert model.spec.family == family
    assert not model.training
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert set(model.report.loaded) == set(weights_of(folder))
    assert model.report == Report(tuple(sorted(weights_of(folder))))
    assert model.tokenizer is None
    assert not any(t.is_meta for t in model.state_dict().values())


def test_path_and_string_and_public_name_are_the_same(golden: Path) -> None:
    folder = golden / "backbones" / "llada"
    assert same(load(folder), mmdlm.load(str(folder)))


def test_sharded_folder_equals_single_file(golden: Path, tmp_path: Path) -> None:
    sharded = load(golden / "backbones" / "llada")
    folder = rewrite(published(golden, tmp_path), lambda weights: weights)
    assert not (folder / INDEX).exists()
    assert same(load(folder), sharded)


def test_shards_without_an_index_load_when_complete(golden: Path, tmp_path: Path) -> None:
    folder = published(golden, tmp_path)
    (folder / INDEX).unlink()
    (folder / "golden.safetensors").unlink()
    assert same(load(folder), load(golden / "backbones" / "llada"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 weight files are missing: model-00002"):
        load(folder)


@pytest.mark.parametrize("prefix", ["model.", "language_model.", "llm_model.", "a.b.model."])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_of_a_wrapper_is_stripped(
    golden: Path, tmp_path: Path, family: str, prefix: str
) -> None:
    folder = rewrite(
        published(golden, tmp_path, family), lambda w: {prefix + k: v for k, v in w.items()}
    )
    model = load(folder)
    assert model.report.prefix == prefix
    assert same(model, load(golden / "backbones" / family))


def test_head_may_stand_outside_of_the_prefix(golden: Path, tmp_path: Path) -> None:
    def wrap(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k if k == "lm_head.weight" else f"model.{k}": v for k, v in weights.items()}

    folder = rewrite(published(golden, tmp_path, "dream"), wrap)
    assert same(load(folder), load(golden / "backbones" / "dream"))


def test_two_language_models_in_one_folder_are_refused(golden: Path, tmp_path: Path) -> None:
    folder = rewrite(
        published(golden, tmp_path, "dream"),
        lambda w: w | {f"draft.{k}": v.clone() for k, v in w.items()},
    )
    with pytest.raises(ValueError, match=r"several prefixes, \['', 'draft.'\]"):
        load(folder)


def test_rotary_tables_of_resaved_files_are_ignored(golden: Path, tmp_path: Path) -> None:
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = rewrite(published(golden, tmp_path, "dream"), lambda w: w | {table: torch.ones(8)})
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
def test_tied_embedding_wins_over_a_stored_head(
    golden: Path, tmp_path: Path, family: str, flag: str, head: str, embedding: str
) -> None:
    folder = configure(rewrite(published(golden, tmp_path, family), lambda w: w), **{flag: True})
    both = load(folder)
    assert "wins" in both.report.ignored[head]
    without = load(rewrite(folder, lambda w: {k: v for k, v in w.items() if k != head}))
    assert without.report.ignored == {}
    copied = rewrite(folder, lambda w: w | {head: w[embedding].clone()})
    untied = load(configure(copied, **{flag: False}))
    ids = torch.arange(12)[None]
    assert torch.equal(both.logits(ids), without.logits(ids))
    assert torch.equal(both.logits(ids), untied.logits(ids))


def test_bfloat16_checkpoint_is_read_exactly(golden: Path, tmp_path: Path) -> None:
    folder = rewrite(published(golden, tmp_path), lambda w: {k: v.bfloat16() for k, v in w.items()})
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


# Damage


def test_missing_shard_is_named(golden: Path, tmp_path: Path) -> None:
    folder = published(golden, tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 .*missing: model-00002-of-00003"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 6, 100, 5000, -1])
def test_truncated_shard_is_named(golden: Path, tmp_path: Path, keep: int) -> None:
    folder = published(golden, tmp_path)
    file = folder / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model-00003.*no complete safetensors.*download"):
        load(folder)


def test_git_lfs_pointer_is_named(golden: Path, tmp_path: Path) -> None:
    folder = published(golden, tmp_path, "dream")
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="git-lfs pointer"):
        load(folder)


def test_index_of_another_checkpoint_is_named(golden: Path, tmp_path: Path) -> None:
    folder = published(golden, tmp_path)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.transformer.extra"] = "model-00001-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index names model.transformer.extra"):
        load(folder)
    index["weight_map"] = {"a": "../elsewhere.safetensors"}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected file names"):
        load(folder)


def test_tensor_in_two_shards_is_named(golden: Path, tmp_path: Path) -> None:
    folder = published(golden, tmp_path)
    shutil.copy(
        folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors"
    )
    with pytest.raises(ValueError, match=r"is in model-00001.* and in model-00002"):
        load(folder)


def test_missing_and_unexpected_tensors_are_named(golden: Path, tmp_path: Path) -> None:
    lost = "model.layers.1.self_attn.k_proj.bias"

    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {("strange" if k == lost else k): v for k, v in weights.items()}

    folder = rewrite(published(golden, tmp_path, "dream"), rename)
    with pytest.raises(ValueError, match=r"1 tensors are missing \(.*k_proj.bias\); 1 .*strange"):
        load(folder)


def test_wrong_shape_is_named(golden: Path, tmp_path: Path) -> None:
    def cut(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "model.layers.0.mlp.up_proj.weight"
        return weights | {name: weights[name][:-1].clone()}

    folder = rewrite(published(golden, tmp_path, "dream"), cut)
    with pytest.raises(ValueError, match=r"up_proj.weight is \[159, 64\], expected \[160, 64\]"):
        load(folder)


def test_rows_moved_from_queries_to_keys_are_noticed(golden: Path, tmp_path: Path) -> None:
    """Both stack to the same fused shape, so only the parts can tell."""

    def move(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        q, k = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")
        rows = torch.cat([weights[q], weights[k]])
        return weights | {q: rows[:48].clone(), k: rows[48:].clone()}

    folder = rewrite(published(golden, tmp_path, "dream"), move)
    with pytest.raises(ValueError, match=r"k_proj.weight is \[48, 64\], expected \[32, 64\]"):
        load(folder)


def test_config_with_fewer_layers_is_noticed(golden: Path, tmp_path: Path) -> None:
    folder = configure(published(golden, tmp_path), n_layers=2)
    with pytest.raises(ValueError, match=r"unexpected \(model.transformer.blocks.2"):
        load(folder)


def test_quantised_tensors_are_refused(golden: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = rewrite(published(golden, tmp_path, "dream"), lambda w: w | {name: w[name].char()})
    with pytest.raises(ValueError, match=r"up_proj.weight is I8 \(quantised"):
        load(folder)
    with pytest.raises(ValueError, match="quantised checkpoints are not read"):
        load(configure(folder, quantization_config={"bits": 4}))


def test_pickles_are_not_read(golden: Path, tmp_path: Path) -> None:
    shutil.copy(golden / "backbones/llada/config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin are pickles"):
        load(tmp_path)


def test_config_that_is_missing_or_broken_is_named(golden: Path, tmp_path: Path) -> None:
    folder = published(golden, tmp_path)
    (folder / "config.json").write_text('{"d_model": ')
    with pytest.raises(ValueError, match="config.json is no JSON"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no config.json, only .*README.md"):
        load(folder)


# Which model


def test_unknown_architecture_names_what_is_supported(golden: Path, tmp_path: Path) -> None:
    folder = configure(published(golden, tmp_path), architectures=["GPT2"], model_type="gpt2")
    with pytest.raises(ValueError, match=r"\['GPT2'\], model_type 'gpt2'.*Supported: dream.*llada"):
        load(folder)


def test_family_override_reads_what_config_does_not_tell(golden: Path, tmp_path: Path) -> None:
    folder = configure(published(golden, tmp_path), architectures=["Mine"], model_type=...)
    assert same(load(folder, family="llada"), load(golden / "backbones" / "llada"))
    with pytest.raises(ValueError, match="no 'lada'; did you mean 'llada'"):
        load(folder, family="lada")
    with pytest.raises(ValueError, match="tensors are missing"):
        load(golden / "backbones" / "llada", family="dream")


def test_config_that_fits_two_families_asks(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Family):
        @classmethod
        def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
            return True

    from mmdlm.backbones.llada import LLaDA

    monkeypatch.setattr(checkpoint.discover, "classes", lambda *a: {"A": LLaDA, "B": Other})
    with pytest.raises(ValueError, match="LLaDA and Other both fit"):
        load(golden / "backbones" / "llada")


def test_unknown_source_names_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny", "small"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    monkeypatch.setattr(checkpoint, "MODELS", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'tinny'; did you mean tiny\?.*\(small, tiny\)"):
        load("tinny")
    (tmp_path / "my_model").mkdir()
    with pytest.raises(FileNotFoundError, match="did you mean my_model"):
        load("./my_modle")
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        load(Path(tmp_path / "models" / "tiny" / "config.json"))


def test_bundled_name_comes_before_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = multimodal()
    save(model, tmp_path / "models" / "tiny")
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "MODELS", tmp_path / "models")
    monkeypatch.chdir(tmp_path / "here")
    assert checkpoint.bundled() == ["tiny"]
    assert same(load("tiny"), model)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load("./tiny")


def test_hub_id_is_downloaded_without_code(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(golden / "backbones" / "dream")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("Dream-org/Dream-v0-Base-7B").spec.family == "dream"
    [(repo, patterns)] = asked
    assert repo == "Dream-org/Dream-v0-Base-7B"
    assert {"*.safetensors", "*.json"} <= set(patterns)
    assert not any(p.endswith((".py", ".bin", ".pt", "*")) for p in patterns)


def test_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is no folder.*no route"):
        load("nobody/nothing")


def test_device_and_dtype_are_checked(golden: Path) -> None:
    folder = golden / "backbones" / "llada"
    with pytest.raises(ValueError, match="dtype='int8', expected auto, float32"):
        load(folder, dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no GPU"):
            load(folder, device="cuda")


@pytest.mark.gpu
def test_automatic_choice_on_a_gpu_is_the_type_of_the_checkpoint(
    golden: Path, tmp_path: Path
) -> None:
    folder = rewrite(published(golden, tmp_path), lambda w: {k: v.bfloat16() for k, v in w.items()})
    model = load(folder)
    assert (model.device.type, model.dtype) == ("cuda", torch.bfloat16)
    assert load(golden / "backbones" / "llada").dtype == torch.float32


# Export to published layouts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [5e9, 1e5])
def test_published_export_is_bit_equal(
    golden: Path, tmp_path: Path, family: str, shard_bytes: float
) -> None:
    folder = golden / "backbones" / family
    model = load(folder)
    save_published(model, tmp_path, shard_bytes=shard_bytes)
    first, second = weights_of(folder), weights_of(tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert (tmp_path / INDEX).exists() == (shard_bytes < 5e9)
    again = load(tmp_path)
    assert again.spec == model.spec
    assert same(again, model)
    ours = json.loads((tmp_path / "config.json").read_text())
    theirs = json.loads((folder / "config.json").read_text())
    differ = {k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]}
    assert differ <= {"torch_dtype"}


def test_published_export_of_a_bfloat16_checkpoint_is_bit_equal(
    golden: Path, tmp_path: Path
) -> None:
    folder = rewrite(published(golden, tmp_path), lambda w: {k: v.bfloat16() for k, v in w.items()})
    save_published(load(folder), tmp_path / "again", dtype="bfloat16")
    first, second = weights_of(folder), weights_of(tmp_path / "again")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_published_export_replaces_an_earlier_one(golden: Path, tmp_path: Path) -> None:
    model = load(golden / "backbones" / "dream")
    save_published(model, tmp_path, shard_bytes=1e5)
    save_published(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", SINGLE]
    save_published(model, tmp_path, shard_bytes=1e5)
    assert not (tmp_path / SINGLE).exists()
    assert same(load(tmp_path), model)


def test_published_export_refuses_what_the_layout_cannot_hold(tmp_path: Path) -> None:
    model = multimodal()
    with pytest.raises(ValueError, match=r"text models only, this one has encoders \(image"):
        save_published(model, tmp_path)
    text = MultimodalDLM(model.spec)
    with pytest.raises(ValueError, match="published LLaDA config cannot say {'attention'"):
        save_published(text, tmp_path)


# Our own layout


def test_own_folder_holds_everything(tmp_path: Path) -> None:
    model = multimodal()
    save(model, tmp_path, card="# Tiny\n")
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "decoding.yaml",
        SINGLE,
        "statistics.json",
        "tokenizer.json",
    ]
    again = load(tmp_path)
    assert same(again, model)
    assert again.spec == model.spec
    assert again.preset == model.preset
    assert again.robot.to_dict() == model.robot.to_dict()
    assert again.tokenizer.encode("what is this ?") == model.tokenizer.encode("what is this ?")
    assert not again.training
    assert set(again.report.loaded) == set(model.state_dict())
    for kind, encoder in model.encoders.items():
        item = encoder.example(1)
        if kind == "state":
            continue
        with torch.inference_mode():
            [first] = model.encode(kind, [model.prepare(kind, item)])
            [second] = again.encode(kind, [again.prepare(kind, item)])
        assert torch.equal(first, second)


def test_own_folder_saved_again_is_byte_equal(tmp_path: Path) -> None:
    save(multimodal(), tmp_path / "a", card="card")
    save(load(tmp_path / "a"), tmp_path / "b", card="card")
    names = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_published_model_survives_our_layout(golden: Path, tmp_path: Path, family: str) -> None:
    model = load(golden / "backbones" / family)
    save(model, tmp_path)
    again = load(tmp_path)
    assert same(again, model)
    assert again.spec == model.spec


def test_own_folder_in_bfloat16_takes_half(tmp_path: Path) -> None:
    model = multimodal()
    save(model, tmp_path / "full")
    save(model, tmp_path / "half", dtype="bfloat16")
    full, half = ((tmp_path / n / SINGLE).stat().st_size for n in ("full", "half"))
    assert half < 0.7 * full
    assert load(tmp_path / "half").dtype == torch.float32
    assert same(load(tmp_path / "half", dtype="bfloat16"), model.bfloat16())


def test_saving_again_drops_what_the_model_lost(tmp_path: Path) -> None:
    model = multimodal()
    save(model, tmp_path, card="card")
    model.robot, model.tokenizer, model.preset = None, None, {}
    save(model, tmp_path)
    again = load(tmp_path)
    assert (again.robot, again.tokenizer, again.preset) == (None, None, {})
    assert (tmp_path / "README.md").read_text() == "card"


def test_backbone_that_is_not_its_spec_is_not_saved(tmp_path: Path) -> None:
    model = multimodal()
    model.backbone.blocks[1].attn.o.lora = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"blocks.1.attn.o.lora.bias, .* merge adapters"):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tokenizer_of_another_checkpoint_is_refused(golden: Path, tmp_path: Path) -> None:
    folder = published(golden, tmp_path)
    Tokenizer.from_words([f"w{i}" for i in range(200)]).save(folder)
    with pytest.raises(ValueError, match="tokenizer.json has 203 tokens, the embedding 160 rows"):
        load(folder)


def test_loading_our_layout_leaves_random_numbers_alone(tmp_path: Path) -> None:
    save(multimodal(), tmp_path)
    before = torch.random.get_rng_state()
    load(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


def test_own_recipes_never_download(tmp_path: Path) -> None:
    model = multimodal()
    model.encoders["image"].arguments["pretrained"] = True
    save(model, tmp_path)
    recipe = json.loads((tmp_path / "config.json").read_text())["encoders"]["image"]
    assert recipe["init_args"]["pretrained"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "mmdlm-9"}, "format 'mmdlm-9', expected 'mmdlm-1'"),
        ({"encoders": ...}, r"lacks \['encoders'\]"),
        ({"spec": {"family": "llada"}}, "TransformerConfig in config.json has unknown"),
        ({"encoders": {"image": {"class_path": "os.system"}}}, "outside encoders and adapters"),
        ({"encoders": {}}, "every encoder needs an adapter"),
        ({"encoders": {}, "adapters": {}}, "tensors are unexpected"),
    ],
)
def test_own_config_that_is_wrong_is_explained(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save(multimodal(), tmp_path)
    with pytest.raises(ValueError, match=message):
        load(configure(tmp_path, **change))


def test_own_spec_with_unknown_entries_is_explained(tmp_path: Path) -> None:
    save(multimodal(), tmp_path)
    spec = json.loads((tmp_path / "config.json").read_text())["spec"]
    with pytest.raises(ValueError, match=r"Spec in config.json has unknown \['speed'\]"):
        load(configure(tmp_path, spec=spec | {"speed": 1}))


def test_family_override_of_our_layout_is_refused(tmp_path: Path) -> None:
    save(multimodal(), tmp_path)
    with pytest.raises(ValueError, match="family='llada' has no effect"):
        load(tmp_path, family="llada")


# Decoding presets


def test_preset_takes_recipes_as_well_as_strategies(tmp_path: Path) -> None:
    file = tmp_path / "decoding.yaml"
    recipe = {"class_path": "mmdlm.decoding.threshold.Threshold", "init_args": {"tau": 0.5}}
    preset.write(file, {"caption": {"length": 8, "strategies": [Blocks(8), recipe]}})
    entry = preset.read(file)["caption"]
    assert entry["length"] == 8
    assert [preset.strategy(each) for each in entry["strategies"]] == [Blocks(8), Threshold(0.5)]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"class_path": "os.system", "init_args": {}}, "names no strategy of mmdlm.decoding"),
        ({"class_path": "mmdlm.decoding.decode.Decoded"}, "names no strategy"),
        ({"class_path": "mmdlm.decoding.treshold.Threshold"}, "did you mean .*threshold.Threshold"),
        (
            {"class_path": "mmdlm.decoding.threshold.Threshold", "init_args": {"tua": 1}},
            r"Threshold takes .*, not \['tua'\]",
        ),
        ("Threshold", "names no strategy"),
    ],
)
def test_preset_names_strategies_only(tmp_path: Path, recipe: Any, message: str) -> None:
    file = tmp_path / "decoding.yaml"
    file.write_text(yaml.safe_dump({"caption": {"strategies": [recipe]}}))
    with pytest.raises(ValueError, match=message):
        preset.read(file)


@pytest.mark.parametrize("text", ["- a\n", "caption: 3\n", "a: [", ""])
def test_preset_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "decoding.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="decoding.yaml"):
        preset.read(file)


# The table of names


def test_table_stacks_parts_and_experts() -> None:
    keys = {
        "blocks.{i}.qkv": ("l.{i}.q", "l.{i}.k", "l.{i}.v"),
        "blocks.{i}.fused": "l.{i}.query_key_value",
        "blocks.{i}.experts.gate_up": ("l.{i}.e.{e}.gate", "l.{i}.e.{e}.up"),
        "blocks.{i}.experts.down": "l.{i}.e.{e}.down",
        "vision.*": None,
    }
    shapes = {
        "blocks.11.qkv": (8, 3),
        "blocks.11.fused": (5, 3),
        "blocks.11.experts.gate_up": (2, 6, 3),
        "blocks.11.experts.down": (2, 3, 4),
    }
    places = expand(keys, shapes, {".qkv": (4, 2, 2)})
    expected = {
        "l.11.q": ((slice(0, 4),), (4, 3)),
        "l.11.k": ((slice(4, 6),), (2, 3)),
        "l.11.v": ((slice(6, 8),), (2, 3)),
        "l.11.query_key_value": ((), (5, 3)),
        "l.11.e.0.gate": ((0, slice(0, 3)), (3, 3)),
        "l.11.e.0.up": ((0, slice(3, 6)), (3, 3)),
        "l.11.e.1.gate": ((1, slice(0, 3)), (3, 3)),
        "l.11.e.1.up": ((1, slice(3, 6)), (3, 3)),
        "l.11.e.0.down": ((0,), (3, 4)),
        "l.11.e.1.down": ((1,), (3, 4)),
    }
    assert {name: (p.index, p.shape) for name, p in places.items()} == expected
    for place in places.values():
        assert torch.zeros(shapes[place.ours])[place.index].shape == place.shape


def test_table_without_a_name_for_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="no tensor for blocks.0.q_norm"):
        expand({"blocks.{i}.k_norm": "k.{i}"}, {"blocks.0.q_norm": (2,)})


def test_known_tensors_of_other_parts_are_dropped_with_the_reason() -> None:
    stored = {n: Stored(Path("f"), (2,), "F32") for n in ("a", "tower.0.w", "m.tower.1.w")}
    places = expand({"ours": "a"}, {"ours": (2,)})
    _, report = resolve(stored, places, {"ours": "a", "tower.*": None}, "m.")
    assert report.ignored == dict.fromkeys(
        ("m.tower.1.w", "tower.0.w"), "known, and no part of this model"
    )
    with pytest.raises(ValueError, match="2 tensors are unexpected"):
        resolve(stored, places, {"ours": "a"}, "m.")


def test_prefix_ends_at_a_dot() -> None:
    assert prefix_of(["model.embed", "x"], "model.embed") == ""
    assert prefix_of(["llm.model.embed"], "model.embed") == "llm."
    assert prefix_of(["supermodel.embed"], "model.embed") == ""


def test_survey_reads_headers(golden: Path) -> None:
    stored = survey(golden / "backbones" / "llada")
    assert stored["model.transformer.wte.weight"].shape == (160, 64)
    assert stored["model.transformer.wte.weight"].dtype == "F32"
    assert len({s.file for s in stored.values()}) == 3


class _WithRouter(Family):
    FLOAT32 = ("norm.weight",)


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
