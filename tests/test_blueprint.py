"""Blueprint: convert a model to plain data and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mmdlm
from adapters.mlp import MLP
from encoders.state import StateEncoder
from mmdlm import blueprint as blueprints
from mmdlm import discover, recipe
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.backbones.moe import MoEConfig
from mmdlm.blueprint import Blueprint, build, describe
from mmdlm.checkpoint import save
from mmdlm.decoding import preset
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.loading.own import read_blueprint, read_tasks
from mmdlm.model import MultimodalDLM

THRESHOLD = {"class_path": "mmdlm.decoding.commits.threshold.Threshold", "init_args": {"tau": 0.5}}
CONFIG = TransformerConfig(vocab=9, width=16, layers=2, heads=2, inner=16)
SPEC = Spec("mmdlm", CONFIG, mask_id=2, eos_id=1, pad_id=0, stop_ids=(3, 4))


def through_json(blueprint: Blueprint) -> Blueprint:
    return Blueprint.from_dict(json.loads(json.dumps(blueprint.to_dict())), "x.json")


def with_state() -> MultimodalDLM:
    return MultimodalDLM(SPEC, {"state": StateEncoder.tiny()}, {"state": MLP(32, 16)})


def test_tiny_is_unchanged_by_json_and_building() -> None:
    model = mmdlm.load("tiny", device="meta")
    plan = describe(model)
    assert set(plan.encoders) == {"image", "audio", "state"}
    assert set(plan.tasks) == {"caption", "answer", "transcribe", "infill", "act"}
    again = build(through_json(plan), model.tokenizer)
    assert through_json(describe(again)) == through_json(plan)
    assert again.robot.to_dict() == model.robot.to_dict()
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (model, again)]
    assert shapes[0] == shapes[1]


def test_every_entry_is_kept() -> None:
    experts = MoEConfig(experts=4, top=2, inner=8, dense=(0,))
    config = TransformerConfig(vocab=9, width=16, layers=2, heads=2, inner=16, moe=experts)
    plan = Blueprint(
        Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0, stop_ids=(3, 4), context=64),
        {"state": recipe.recipe(StateEncoder.tiny())},
        {"state": recipe.recipe(MLP(32, 16))},
        template={"media": {"image": "{}\n"}, "system": "Be brief."},
        tasks={"caption": {"length": 8, "strategies": [THRESHOLD]}, "act": {"execute": 4}},
        system="other",
    )
    assert through_json(plan) == plan
    model = build(plan)
    assert (model.system, model.template.to_dict()) == ("other", plan.template)
    assert describe(model) == plan


def test_weights_are_on_the_meta_device_before_loading() -> None:
    model = build(describe(mmdlm.load("tiny", device="meta")))
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", discover.names("encoders"))
def test_encoders_built_on_meta_equal_those_built_on_the_cpu(name: str) -> None:
    made = discover.find("encoders", name).tiny().eval()
    plan = Blueprint(SPEC, {made.kind: recipe.recipe(made)}, {made.kind: recipe.recipe(MLP(2, 16))})
    again = build(plan).encoders[made.kind].eval()
    again.load_state_dict(made.state_dict(), assign=True)
    item = made.prepare(made.example())
    with torch.no_grad():
        assert torch.equal(again([item]).tokens, made([item]).tokens)


def test_part_with_tensors_missing_in_files_is_built_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = StateEncoder.__init__

    def with_table(
        self: StateEncoder, size: int, dim: int = 192, tokens: int = 1, hidden: int = 256
    ) -> None:
        first(self, size, dim, tokens, hidden)
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    monkeypatch.setattr(StateEncoder, "__init__", with_table)
    adapter = recipe.recipe(MLP(32, 16))
    before = torch.random.get_rng_state()
    encoder = {"class_path": "encoders.state.StateEncoder", "init_args": {"size": 4, "dim": 32}}
    again = build(Blueprint(SPEC, {"state": encoder}, {"state": adapter}))
    assert again.encoders["state"].table.tolist() == [0.0, 1.0, 2.0]
    assert torch.equal(before, torch.random.get_rng_state())


def test_nothing_is_downloaded() -> None:
    model = with_state()
    model.encoders["state"].arguments["pretrained"] = True
    plan = describe(model)
    assert plan.encoders["state"]["init_args"]["pretrained"] is False


def test_strategies_may_be_instances_or_recipes(tmp_path: Path) -> None:
    model = MultimodalDLM(SPEC)
    model.preset = {"caption": {"length": 8, "strategies": [Blocks(8), THRESHOLD]}}
    save(model, tmp_path)
    entry = read_tasks(tmp_path / "decoding.yaml")["caption"]
    assert entry["length"] == 8
    assert preset.strategies(entry["strategies"]) == [Blocks(8), Threshold(0.5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "mmdlm-9"}, "x.json: format is 'mmdlm-9', expected 'mmdlm-2'; a newer"),
        ({"encoders": ...}, r"x.json lacks \['encoders'\]"),
        ({"speed": 1}, r"x.json: Blueprint has unknown \['speed'\]"),
        ({"spec": {"family": "llada"}}, "x.json: TransformerConfig has unknown"),
        ({"spec": 3}, "x.json: spec is 3, expected a table"),
        ({"encoders": [1]}, "x.json: encoders is .*, expected a table"),
        ({"encoders": {"image": {"class_path": "os.system"}}}, "x.json: class_path 'os.system' is"),
        ({"adapters": {"image": "adapters.mlp.MLP"}}, "x.json: .* is not a recipe"),
        ({"outputs": {"speech": {}}}, r"x.json: outputs has \['speech'\]"),
        ({"template": {"text": ""}}, r"x.json: template has \['text'\]"),
        ({"tasks": {"caption": 3}}, "x.json: task 'caption' is int, expected a table"),
        ({"tasks": {"caption": {"lengths": 3}}}, r"task 'caption' has \['lengths'\]; expected"),
        ({"tasks": {"a": {"strategies": ["Threshold"]}}}, "'Threshold' is not a recipe"),
        (
            {"tasks": {"a": {"strategies": [{"class_path": "adapters.mlp.MLP"}]}}},
            "is outside mmdlm.decoding",
        ),
    ],
)
def test_wrong_entries_are_named_with_the_file(change: dict[str, Any], message: str) -> None:
    given = json.loads(json.dumps(describe(with_state()).to_dict())) | change
    with pytest.raises(ValueError, match=message):
        Blueprint.from_dict({k: v for k, v in given.items() if v is not ...}, "x.json")


def test_spec_with_unknown_or_missing_entries_is_explained() -> None:
    given = describe(with_state()).to_dict()
    with pytest.raises(ValueError, match=r"Spec has unknown \['speed'\] and lacks \[\]"):
        Blueprint.from_dict(given | {"spec": given["spec"] | {"speed": 1}}, "x.json")
    spec = {name: value for name, value in given["spec"].items() if name != "mask_id"}
    with pytest.raises(ValueError, match=r"Spec has unknown \[\] and lacks \['mask_id'\]"):
        Blueprint.from_dict(given | {"spec": spec}, "x.json")


def test_robot_without_an_entry_is_not_built() -> None:
    plan = Blueprint(SPEC, outputs={"actions": {"chunk": 3}})
    with pytest.raises(KeyError, match="statistics.json lacks"):
        build(plan)


# decoding.yaml


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_path": "os.system", "init_args": {}}, "'os.system' is outside mmdlm.decoding"),
        ({"class_path": "mmdlm.decoding.decode.Decoded"}, "does not name a class of mmdlm.decod"),
        ({"class_path": "mmdlm.decoding.treshold.Threshold"}, "did you mean .*threshold.Threshold"),
        (
            {"class_path": "mmdlm.decoding.commits.threshold.Threshold", "init_args": {"tua": 1}},
            r"Threshold takes .*, not \['tua'\]",
        ),
        ("Threshold", "is not a recipe"),
    ],
)
def test_folder_whose_strategies_cannot_be_built_does_not_load(
    tmp_path: Path, given: Any, message: str
) -> None:
    save(MultimodalDLM(SPEC), tmp_path)
    file = tmp_path / "decoding.yaml"
    file.write_text(yaml.safe_dump({"caption": {"strategies": [given]}}))
    with pytest.raises(ValueError, match=message) as error:
        mmdlm.load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "task 'caption'" in str(error.value)


def test_strategy_paths_of_the_first_edition_are_found(tmp_path: Path) -> None:
    flat = {"class_path": "mmdlm.decoding.threshold.Threshold", "init_args": {"tau": 0.5}}
    save(MultimodalDLM(SPEC), tmp_path)
    file = tmp_path / "decoding.yaml"
    file.write_text(yaml.safe_dump({"caption": {"strategies": [flat]}}))
    entry = mmdlm.load(tmp_path).preset["caption"]
    assert preset.strategies(entry["strategies"]) == [Threshold(0.5)]


@pytest.mark.parametrize("text", ["- a\n", "caption: 3\n", "a: [", ""])
def test_decoding_that_is_not_a_mapping_is_rejected(tmp_path: Path, text: str) -> None:
    file = tmp_path / "decoding.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="decoding.yaml"):
        read_tasks(file)


# Folders of the first edition


def test_folder_of_the_first_edition_loads() -> None:
    folder = Path(mmdlm.__file__).parent / "models" / "tiny"
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == "mmdlm-1"
    plan = read_blueprint(folder, config)
    assert plan.outputs["actions"] == json.loads((folder / "statistics.json").read_text())
    assert plan.tasks == yaml.safe_load((folder / "decoding.yaml").read_text())
    assert plan.spec.attention == "cascade"
    assert blueprints.FORMAT == plan.to_dict()["format"] == "mmdlm-2"


def test_folder_of_the_first_edition_saved_again_has_the_same_weights(
    tmp_path: Path,
) -> None:
    first = mmdlm.load("tiny", dtype="stored")
    save(first, tmp_path)
    again = mmdlm.load(tmp_path, dtype="stored")
    assert describe(again) == describe(first)
    a, b = first.state_dict(), again.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
