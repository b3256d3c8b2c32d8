"""A published multimodal system, here a ViT, a projector and LLaDA, is read and written."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapters.mlp import MLP
from encoders.vit import ViT
from mmdlm import discover
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Keys, Spec
from mmdlm.backbones.llada import LLaDA
from mmdlm.blueprint import Blueprint, describe
from mmdlm.chat import Template
from mmdlm.checkpoint import load, save, save_published
from mmdlm.export import export
from mmdlm.loading.shards import INDEX, SINGLE
from mmdlm.model import MultimodalDLM
from mmdlm.systems import system as systems
from mmdlm.systems.system import Beside, System, backbone, renamed, table

VIT = {"size": 16, "patch": 8, "dim": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
VIT |= {"stem": "patch", "layers": 1}
THRESHOLD = {"class_path": "mmdlm.decoding.commits.threshold.Threshold", "init_args": {"tau": 0.5}}


class Toy(System):
    """LLaDA with a ViT, whose config and weights are in a sub-folder; the projector is a file."""

    FILES = ("vision/config.json",)
    WEIGHTS = (
        Beside("vision", "tower.vision_model.", instead="vision_model."),
        Beside("projector.safetensors", "projector."),
    )

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        return config.get("model_type") == "toy_vlm"

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        spec = LLaDA.read(config, names)
        encoder = {"class_path": "encoders.vit.ViT", "init_args": config["vision/config.json"]}
        sizes = {"in_dim": config["mm_hidden_size"], "out_dim": spec.transformer.width}
        return Blueprint(
            spec,
            {"image": encoder},
            {"image": {"class_path": "adapters.mlp.MLP", "init_args": sizes}},
            template={"media": {"image": "{}\n"}, "system": "You see."},
            tasks={"answer": {"length": 8, "strategies": [THRESHOLD]}},
        )

    @classmethod
    def keys(cls, blueprint: Blueprint) -> dict[str, tuple[str, Keys]]:
        tower = table(blueprint.encoders["image"])
        projector = renamed(table(blueprint.adapters["image"]), "model.mm_projector.")
        return {
            "backbone": ("llm.", backbone(LLaDA)),
            "encoders.image": ("tower.", tower | {"vision_model.post_layernorm.*": None}),
            "": ("", {"vision/text_model.*": None}),
            "adapters.image": ("projector.", projector),
        }

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        plan = describe(model)
        return LLaDA.write(model.spec) | {
            "architectures": ["ToyVLM"],
            "model_type": "toy_vlm",
            "mm_hidden_size": plan.adapters["image"]["init_args"]["in_dim"],
            "vision/config.json": plan.encoders["image"]["init_args"],
        }


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[System]:
    """The system, as if it were in the file mmdlm/systems/toy.py."""
    module = ModuleType("mmdlm.systems.toy")
    module.Toy = Toy
    monkeypatch.setattr(Toy, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = discover._classes_by_module

    def with_toy(package: str, base: str) -> dict[str, tuple[str, ...]]:
        more = {"toy": ("Toy",)} if package == "mmdlm.systems" else {}
        return found(package, base) | more

    monkeypatch.setattr(discover, "_classes_by_module", with_toy)
    return Toy


def make(**spec: Any) -> MultimodalDLM:
    """An untrained model of the system."""
    config = TransformerConfig(
        vocab=40, width=16, layers=2, heads=4, kv_heads=2, inner=24, eps=1e-5, rotary_float32=True
    )
    ids = {"mask_id": 2, "eos_id": 1, "pad_id": 0, "template": "llada", "context": 64}
    torch.manual_seed(0)
    vit = ViT(**VIT)
    model = MultimodalDLM(
        Spec("llada", config, **ids | spec), {"image": vit}, {"image": MLP(32, 16)}
    )
    model.backbone.reset(torch.Generator().manual_seed(0))
    model.system = "toy"
    model.template = Template(**{"media": {"image": "{}\n"}, "system": "You see."})
    return model.eval()


@pytest.fixture
def folder(toy: type[System], tmp_path: Path) -> Path:
    """A checkpoint of it, written."""
    save_published(make(), tmp_path / "toy")
    return tmp_path / "toy"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by file and name."""
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in folder.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def bits_equal(first: Path, second: Path) -> bool:
    a, b = stored(first), stored(second)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def test_every_part_is_written_under_its_published_name(folder: Path) -> None:
    names = {name.partition(":")[::2] for name in stored(folder)}
    assert ("model.safetensors", "llm.model.transformer.blocks.1.q_proj.weight") in names
    table = "vision_model.embeddings.position_embedding.weight"
    assert ("vision/model.safetensors", table) in names
    assert stored(folder)[f"vision/model.safetensors:{table}"].shape == (4, 32)
    assert {name for file, name in names if file == "projector.safetensors"} == {
        f"{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert json.loads((folder / "vision" / "config.json").read_text())["patch"] == 8
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == ("toy_vlm", "float32")
    assert "vision/config.json" not in config


def test_folder_is_read_as_the_model_it_was_written_from(
    folder: Path, same: Callable[[nn.Module, nn.Module], bool]
) -> None:
    model, again = make(), load(folder)
    assert same(model, again)
    assert again.system == "toy"
    assert again.spec == model.spec
    assert again.template == model.template
    assert again.preset == {"answer": {"length": 8, "strategies": [THRESHOLD]}}
    assert len(again.report.loaded) == len(stored(folder))
    assert (again.report.ignored, again.report.missing) == ({}, ())
    with torch.inference_mode():
        item = model.processor.prepare("image", ViT.example(3))
        [first], [second] = (m.encode("image", [item]) for m in (model, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shard_bytes", [5e9, 4e3])
def test_folder_written_again_is_bit_equal(
    folder: Path, tmp_path: Path, shard_bytes: float
) -> None:
    export(folder, tmp_path / "again", layout="published", shard_bytes=shard_bytes)
    assert (tmp_path / "again" / INDEX).exists() == (shard_bytes < 5e9)
    if shard_bytes == 5e9:
        assert bits_equal(folder, tmp_path / "again")
        for name in ("config.json", "vision/config.json"):
            assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()
    export(tmp_path / "again", tmp_path / "whole", layout="published")
    assert bits_equal(folder, tmp_path / "whole")


@pytest.mark.parametrize("through", ["published", "own"])
def test_what_the_source_says_beyond_the_model_stays(
    folder: Path, tmp_path: Path, through: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 31, "auto_map": {"AutoModel": "mine.Mine"}, "mm_extra": {"a": [1]}}
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [1, 4], "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    vision = json.loads((folder / "vision" / "config.json").read_text())
    export(folder, tmp_path / "between", layout=through)
    export(tmp_path / "between", tmp_path / "again", layout="published")
    for name, wanted in {
        "config.json": config,
        "vision/config.json": vision,
        "generation_config.json": generation,
    }.items():
        assert json.loads((tmp_path / "again" / name).read_text()) == wanted


def test_unused_tensors_are_known_and_written_back(folder: Path, tmp_path: Path) -> None:
    file = folder / "vision" / SINGLE
    norm = {f"vision_model.post_layernorm.{n}": torch.randn(32) for n in ("weight", "bias")}
    text = {"text_model.embed.weight": torch.randn(3, 2)}
    save_file(load_file(file) | norm | text, file)
    model = load(folder, dtype="stored")
    reason = "known, and not part of this model"
    assert model.report.ignored == {
        **{f"tower.{name}": reason for name in norm},
        "vision/text_model.embed.weight": reason,
    }
    save_published(model, tmp_path / "again")
    assert bits_equal(folder, tmp_path / "again")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"tower.vision_model.post_layernorm.*are gone"):
        save_published(model, tmp_path / "more")


def test_each_part_keeps_its_stored_type(folder: Path, tmp_path: Path) -> None:
    save_file({n: t.bfloat16() for n, t in load_file(folder / SINGLE).items()}, folder / SINGLE)
    model = load(folder, dtype="stored")
    assert model.dtype == torch.bfloat16
    assert model.adapters["image"].layers[0].weight.dtype == torch.float32
    export(folder, tmp_path / "again", layout="published")
    assert bits_equal(folder, tmp_path / "again")
    assert load(folder, dtype="bfloat16").adapters["image"].layers[0].weight.dtype == torch.bfloat16


def test_our_layout_and_back_is_bit_equal(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    save(model, tmp_path / "own")
    again = load(tmp_path / "own")
    assert describe(again) == describe(model)
    save_published(again, tmp_path / "back")
    assert bits_equal(folder, tmp_path / "back")


def test_weights_may_all_be_in_sub_folders_or_all_in_one_file(
    folder: Path, tmp_path: Path, same: Callable[[nn.Module, nn.Module], bool]
) -> None:
    first = load(folder)
    whole = load_file(folder / SINGLE)
    for beside in Toy.WEIGHTS:
        file = folder / beside.path
        file = file / SINGLE if file.is_dir() else file
        whole |= {beside.name(name): tensor for name, tensor in load_file(file).items()}
        file.unlink()
    save_file(whole, folder / SINGLE)
    assert same(load(folder), first)
    save_file({"0.weight": torch.zeros(16, 32)}, folder / "projector.safetensors")
    with pytest.raises(ValueError, match=r"projector.0.weight are in projector.safetensors and"):
        load(folder)


def test_weights_may_be_in_sub_folders_only(
    folder: Path,
    same: Callable[[nn.Module, nn.Module], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = load(folder)
    weights = load_file(folder / SINGLE)
    (folder / "llm").mkdir()
    save_file({n.removeprefix("llm."): t for n, t in weights.items()}, folder / "llm" / SINGLE)
    (folder / "mm").mkdir()
    (folder / "projector.safetensors").rename(folder / "mm" / SINGLE)
    (folder / SINGLE).unlink()
    parts = (Beside("llm", "llm."), Beside("vision", "tower."))
    monkeypatch.setattr(Toy, "WEIGHTS", (*parts, Beside("mm", "projector.")))
    assert same(load(folder), first)
    monkeypatch.setattr(Toy, "WEIGHTS", (*parts, Beside("mm", "other.")))
    with pytest.raises(ValueError, match="4 tensors are missing .*4 tensors are unexpected"):
        load(folder)
    monkeypatch.setattr(Toy, "WEIGHTS", ())
    with pytest.raises(FileNotFoundError, match=r"holds no \*.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {n: t for n, t in w.items() if n != "0.bias"},
            "1 tensors are missing .proj.*0.b",
        ),
        (lambda w: w | {"7.bias": w["0.bias"].clone()}, r"1 tensors are unexpected .projector.7"),
        (lambda w: w | {"0.bias": torch.zeros(3)}, r"projector.0.bias is \[3\], expected \[16\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict], dict], message: str
) -> None:
    file = folder / "projector.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_overrides_and_hints_apply_to_systems(folder: Path) -> None:
    model = load(folder, mask_id=7, family="toy")
    assert (model.spec.mask_id, model.system, list(model.encoders)) == (7, "toy", ["image"])
    alone = load(folder, family="llada")
    assert (alone.system, list(alone.encoders), alone.report.prefix) == (None, [], "llm.")
    assert torch.equal(alone.backbone.embed.weight, model.backbone.embed.weight)


def test_model_the_layout_cannot_express_is_not_written(toy: type[System], tmp_path: Path) -> None:
    model = make()
    model.template = Template(media={"image": "<image>{}"})
    with pytest.raises(
        ValueError, match="layout of toy cannot express .* with other template; use"
    ):
        save_published(model, tmp_path / "a")
    model = make(stop_ids=(9,), eos_id=8)
    model.encoders["image"].arguments["mean"] = (0.1, 0.2, 0.3)
    save_published(model, tmp_path / "b")
    assert load(tmp_path / "b").encoders["image"].preprocess.mean == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match="cannot express {'shift'"):
        save_published(make(shift=True), tmp_path / "c")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "c").exists()


def test_system_that_names_no_table_for_a_part_is_told(
    toy: type[System], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = Toy.keys(describe(make()))
    del tables["adapters.image"]
    monkeypatch.setattr(Toy, "keys", lambda blueprint: tables)
    with pytest.raises(ValueError, match=r"no table of published names for adapters.image.layers"):
        save_published(make(), tmp_path / "a")


def test_two_systems_that_fit_ask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(System):
        @classmethod
        def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
            return True

    class Closer(Toy):
        pass

    found = discover.classes

    def classes(package: str, base: type) -> dict[str, type]:
        return {"Toy": Toy, extra.__name__: extra} if base is System else found(package, base)

    monkeypatch.setattr(discover, "classes", classes)
    extra = Other
    with pytest.raises(ValueError, match="systems toy and test_system both fit"):
        load(folder)


def test_tables_are_found_by_recipe_and_renamed() -> None:
    vit = table({"class_path": "encoders.vit.ViT", "init_args": {}})
    assert vit == ViT.KEYS
    assert vit is not ViT.KEYS
    with pytest.raises(ValueError, match="encoders.state.StateEncoder has no KEYS"):
        table({"class_path": "encoders.state.StateEncoder"})
    keys = {"a": "m.x", "b": ("m.y", "m.z"), "m.tower.*": None}
    assert renamed(keys, "m.", "n.") == {"a": "n.x", "b": ("n.y", "n.z"), "m.tower.*": None}
    with pytest.raises(ValueError, match="'m.x' does not begin with 'k.'"):
        renamed(keys, "k.")


def test_base_class_names_what_a_system_lacks() -> None:
    for call, message in (
        (lambda: System.matches({}, set()), r"System does not define matches\(config, names\)"),
        (lambda: System.read({}, set()), r"System does not define read\(config, names\)"),
        (lambda: System.keys(None), r"System does not define keys\(blueprint\)"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(ValueError, match="read only; save in our own layout"):
        System.write(None)
    assert discover.BASES[systems.__package__].endswith(".System")
