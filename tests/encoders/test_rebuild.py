"""Encoders and adapters built again from what a checkpoint says about them."""

import copy
import json
import pickle
import sys
from functools import partial

import pytest
import torch

from adapters.mlp import MLP
from adapters.pool import Pool
from adapters.prune_divprune import DivPrune
from encoders.features import Features
from encoders.rebuild import rebuild
from encoders.state import StateEncoder
from encoders.vit import ViT
from mmdlm import discover

ENCODERS = discover.classes("encoders")
ADAPTERS = discover.classes("adapters")


def through_json(recipe):
    return json.loads(json.dumps(recipe))


def shapes(module):
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


def outputs(encoder):
    with torch.no_grad():
        return encoder.eval()([encoder.prepare(encoder.example())]).tokens


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_built_again(name):
    made = ENCODERS[name].tiny()
    again = rebuild(through_json(made.recipe()))
    assert type(again) is type(made)
    assert again.recipe() == made.recipe()
    again.load_state_dict(made.state_dict())
    assert torch.equal(outputs(again), outputs(made))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_built_again(name):
    made = ADAPTERS[name](8, 12)
    again = rebuild(through_json(made.recipe()))
    assert type(again) is type(made)
    assert again.recipe() == made.recipe()
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
def test_recipes_hold_what_was_given(made):
    again = rebuild(through_json(made.recipe()))
    assert shapes(again) == shapes(made)
    assert getattr(again, "mean", None) == getattr(made, "mean", None)


def test_recipes_read_like_configs():
    assert Pool(4, 6, "concat").recipe() == {
        "class_path": "adapters.pool.Pool",
        "init_args": {"in_dim": 4, "out_dim": 6, "kind": "concat"},
    }


@pytest.mark.parametrize("inner", [Pool, partial(Pool, factor=3, layers=1)])
def test_an_adapter_within_an_adapter_is_built_again(inner):
    made = DivPrune(8, 12, inner=inner, keep=2)
    again = rebuild(through_json(made.recipe()))
    assert type(again.inner) is Pool
    assert again.inner.factor == made.inner.factor
    assert shapes(again) == shapes(made)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_remember_how_they_were_built(way):
    made = Pool(4, 6, "concat", factor=3)
    again = way(made)
    assert again.recipe() == made.recipe()
    assert torch.equal(again.project.layers[0].weight, made.project.layers[0].weight)


@pytest.mark.parametrize(
    "path", ["os.system", "torch.nn.Linear", "mmdlm.model.MultimodalDLM", "Linear", ""]
)
def test_other_code_is_refused(path):
    with pytest.raises(ValueError, match="outside encoders and adapters; refused"):
        rebuild({"class_path": path, "init_args": {}})


def test_other_code_is_not_even_imported():
    with pytest.raises(ValueError, match="refused"):
        rebuild({"class_path": "this.Zen", "init_args": {}})
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "path", ["encoders.vit.PatchEmbed", "adapters.pool.rearrange", "adapters.mlp.MPL"]
)
def test_what_is_no_encoder_or_adapter_is_refused(path):
    with pytest.raises(ValueError, match="names no encoder or adapter"):
        rebuild({"class_path": path, "init_args": {}})
