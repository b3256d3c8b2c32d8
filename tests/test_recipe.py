"""Rebuilding objects from recipes, restricted to the given packages."""

import copy
import json
import pickle
import sys

import pytest
import torch

from adapters.mlp import MLP
from adapters.pool import Pool
from encoders.anyres import AnyRes
from encoders.arguments import Recorded
from encoders.features import Features
from encoders.state import StateEncoder
from encoders.vit import ViT
from mmdlm import discover
from mmdlm.blueprint import PARTS
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.strategy import Strategy
from mmdlm.recipe import build, complete, find, recipe

ENCODERS = discover.classes("encoders")
ADAPTERS = discover.classes("adapters")


def again_from(made):
    """Object rebuilt from the recipe of another, through JSON."""
    return build(json.loads(json.dumps(recipe(made))), PARTS, Recorded)


def shapes(module):
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


def outputs(encoder):
    with torch.no_grad():
        return encoder.eval()([encoder.prepare(encoder.example())]).tokens


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_rebuilt(name):
    made = ENCODERS[name].tiny()
    again = again_from(made)
    assert type(again) is type(made)
    assert recipe(again) == recipe(made)
    again.load_state_dict(made.state_dict())
    assert torch.equal(outputs(again), outputs(made))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_rebuilt(name):
    made = ADAPTERS[name](8, 12)
    again = again_from(made)
    assert type(again) is type(made)
    assert recipe(again) == recipe(made)
    again.load_state_dict(made.state_dict())
    features = Features(torch.randn(2, 16, 8), torch.ones(2, 16, dtype=torch.bool), (4, 4))
    with torch.no_grad():
        assert torch.equal(again(features).tokens, made(features).tokens)


@pytest.mark.parametrize(
    "made",
    [
        ViT(size=32, patch=8, dim=16, depth=1, heads=2, mean=(0.1, 0.2, 0.3), stem="patch"),
        StateEncoder(3, 16, hidden=8),
        MLP(4, 6, layers=3),
        Pool(4, 6, "concat", factor=3),
    ],
    ids=lambda made: type(made).__name__,
)
def test_recipes_contain_the_arguments(made):
    again = again_from(made)
    assert shapes(again) == shapes(made)
    assert getattr(again, "preprocess", None) == getattr(made, "preprocess", None)


def test_recipes_have_the_format_of_configs():
    assert recipe(Pool(4, 6, "concat")) == {
        "class_path": "adapters.pool.Pool",
        "init_args": {"in_dim": 4, "out_dim": 6, "kind": "concat"},
    }


def test_nested_encoders_are_rebuilt():
    made = AnyRes(ViT(size=16, patch=8, dim=32, depth=1, heads=2), [[16, 32]])
    again = again_from(made)
    assert type(again.encoder) is ViT
    assert again.encoder.size == 16
    assert shapes(again) == shapes(made)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_keep_their_arguments(way):
    made = Pool(4, 6, "concat", factor=3)
    again = way(made)
    assert recipe(again) == recipe(made)
    assert torch.equal(again.project.layers[0].weight, made.project.layers[0].weight)


@pytest.mark.parametrize(
    "path", ["os.system", "torch.nn.Linear", "mmdlm.model.MultimodalDLM", "Linear", "", "adapters"]
)
def test_foreign_classes_are_rejected(path):
    with pytest.raises(ValueError, match="is outside encoders and adapters; a checkpoint may"):
        build({"class_path": path, "init_args": {}}, PARTS, Recorded)


def test_foreign_classes_are_not_imported():
    with pytest.raises(ValueError, match="is outside"):
        build({"class_path": "this.Zen", "init_args": {}}, PARTS, Recorded)
    assert "this" not in sys.modules


def test_foreign_classes_in_arguments_are_rejected():
    inner = {"class_path": "os.system", "init_args": {}}
    given = {"encoder": inner, "pinpoints": [[16, 32]]}
    with pytest.raises(ValueError, match="'os.system' is outside"):
        build({"class_path": "encoders.anyres.AnyRes", "init_args": given}, PARTS, Recorded)


@pytest.mark.parametrize(
    "path",
    [
        "encoders.vit.PatchEmbed",
        "adapters.pool.rearrange",
        "adapters.mlp.MPL",
        "encoders.encoder.Recorded",
        "adapters.pool.MLP",
        "adapters..mlp.MLP",
    ],
)
def test_names_that_are_not_classes_of_the_module_are_rejected(path):
    with pytest.raises(ValueError, match="does not name a class of|is outside"):
        build({"class_path": path, "init_args": {}}, PARTS, Recorded)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("adapters.mlp.MLP", "is not a recipe; expected {class_path"),
        ({"class_path": 3}, "is not a recipe"),
        ({"class_path": "adapters.mlp.MLP", "args": {}}, "is not a recipe"),
        ({"class_path": "adapters.mlp.MLP", "init_args": [1, 2]}, "expected a table"),
        (
            {"class_path": "adapters.mlp.MLP", "init_args": {"in_dims": 1}},
            r"MLP takes \['in_dim', 'out_dim', 'layers'\], not \['in_dims'\]",
        ),
        (
            {"class_path": "adapters.mlp.MLP", "init_args": {"in_dim": 2, "out_dim": "x"}},
            "MLP does not take {'in_dim': 2, 'out_dim': 'x'}",
        ),
        ({"class_path": "adapters.mpl.MLP"}, "did you mean adapters.mlp.MLP"),
    ],
)
def test_invalid_recipes_are_rejected(given, message):
    with pytest.raises(ValueError, match=message):
        build(given, PARTS, Recorded)


def test_strategies_are_rebuilt():
    found = recipe(Blocks(7))
    assert found == {"class_path": "mmdlm.decoding.plans.blocks.Blocks", "init_args": {"size": 7}}
    assert build(found, ["mmdlm.decoding"], Strategy) == Blocks(7)
    with pytest.raises(ValueError, match="does not name a class of mmdlm.decoding"):
        build({"class_path": "mmdlm.decoding.decode.Decoded"}, ["mmdlm.decoding"], Strategy)


def test_arguments_that_are_not_plain_data_are_rejected():
    with pytest.raises(TypeError, match="has no recipe"):
        recipe(3)
    made = Pool(4, 6)
    made.arguments["kind"] = torch.float32
    with pytest.raises(TypeError, match="torch.float32 is not plain data"):
        recipe(made)


def test_class_moved_to_a_sub_folder_is_found_under_its_old_path(tmp_path, monkeypatch):
    inside = tmp_path / "herd" / "cattle"
    inside.mkdir(parents=True)
    (tmp_path / "herd" / "__init__.py").write_text("")
    (inside / "__init__.py").write_text("")
    code = "from encoders.arguments import Recorded\nclass Cow(Recorded):\n    pass\n"
    (inside / "cow.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    found = find("herd.cow.Cow", ["herd"], Recorded)
    assert found is find("herd.cattle.cow.Cow", ["herd"], Recorded)
    assert found.__module__ == "herd.cattle.cow"


def test_recipes_are_compared_with_defaults():
    short = complete(recipe(Pool(4, 6, "concat")), PARTS, Recorded)
    full = complete(recipe(Pool(4, 6, kind="concat", layers=2)), PARTS, Recorded)
    assert short == full
    assert short != complete(recipe(Pool(4, 6, "concat", factor=3)), PARTS, Recorded)
