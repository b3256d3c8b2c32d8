"""Freezing and learning rates by name pattern."""

import pytest
import torch
from torch import nn

from adapters.mlp import MLP
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.objectives.masked import Masked
from mmdlm.training import tune
from mmdlm.training.module import Module
from mmdlm.training.new_model import NewModel
from mmdlm.training.optimizer import AdamW
from mmdlm.training.tune import Rate


def module(rules=None, **settings):
    new = NewModel(
        TransformerConfig(width=16, layers=2, heads=2, inner=16),
        {"image": ViT(size=32, patch=8, dim=16, depth=1, heads=2)},
        {"image": MLP},
    )
    return Module(Masked(), new, tune=rules, words=["a", "b"], **settings)


def frozen(made):
    return {name for name, p in made.model.named_parameters() if not p.requires_grad}


def names(made, prefix=""):
    return {name for name, _ in made.model.named_parameters() if name.startswith(prefix)}


def groups(made):
    """Group name to (names of parameters, lr, weight decay) of the optimizer."""
    made._trainer = type("Trainer", (), {"max_steps": 10, "max_epochs": -1, "callbacks": []})()
    by_id = {id(p): name for name, p in made.model.named_parameters()}
    return {
        group["name"]: (
            {by_id[id(p)] for p in group["params"]},
            group["initial_lr"],
            group["weight_decay"],
        )
        for group in made.configure_optimizers()["optimizer"].param_groups
    }


def test_without_rules_everything_is_trained_alike():
    made = module(optimizer=AdamW(lr=1e-3, weight_decay=0.1))
    found = groups(made)
    assert list(found) == ["default", "default (no decay)"]
    assert {(lr, decay) for _, lr, decay in found.values()} == {(1e-3, 0.1), (1e-3, 0.0)}
    assert found["default"][0] | found["default (no decay)"][0] == names(made)
    sizes = {name: p.ndim for name, p in made.model.named_parameters()}
    assert all(sizes[name] > 1 for name in found["default"][0])
    assert all(sizes[name] <= 1 for name in found["default (no decay)"][0])


def test_frozen_patterns_leave_the_optimizer_and_rates_reach_it():
    rules = {"encoders.*": "frozen", "backbone.*": Rate(lr=1e-5, weight_decay=0.2)}
    made = module(rules, optimizer=AdamW(lr=1e-3, weight_decay=0.1))
    assert frozen(made) == names(made, "encoders.")
    found = groups(made)
    assert found["backbone.*"][1:] == (1e-5, 0.2)
    assert found["backbone.* (no decay)"][1:] == (1e-5, 0.0)
    assert found["default"][1:] == (1e-3, 0.1)
    of = {key: set().union(*(v[0] for k, v in found.items() if k.startswith(key))) for key in found}
    assert of["backbone.*"] == names(made, "backbone.")
    assert of["default"] == names(made, "adapters.")


def test_the_last_matching_pattern_decides_alone():
    rules = {
        "*": Rate(lr=1e-4, weight_decay=0.3),
        "backbone.*": "frozen",
        "backbone.out.weight": Rate(lr=2e-4),
    }
    made = module(rules, optimizer=AdamW(lr=1e-3, weight_decay=0.1))
    assert frozen(made) == names(made, "backbone.") - {"backbone.out.weight"}
    found = groups(made)
    # Its weight decay is the optimizer's, not that of "*".
    assert found["backbone.out.weight"] == ({"backbone.out.weight"}, 2e-4, 0.1)
    assert found["*"][1:] == (1e-4, 0.3)


def test_a_text_model_has_no_adapters_to_match():
    rules = {"*": "frozen", "adapters.*": Rate(lr=1e-3), "backbone.out.*": Rate(lr=1e-4)}
    found = tune.assign(["backbone.embed.weight", "backbone.out.weight"], rules)
    assert found == {"backbone.embed.weight": "*", "backbone.out.weight": "backbone.out.*"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"encoder.*": "frozen"},
            r"'encoder\.\*' matches no parameter.*did you mean 'encoders\.\*",
        ),
        ({"xyz": "frozen"}, r"'xyz' matches no parameter.*expected, e\.g\., 'backbone"),
        ({"backbone.out.*": Rate(lr=1e-5), "*": Rate()}, r"'backbone\.out\.\*' has no effect"),
        ({"*": "frozen"}, "nothing is left to train"),
        ({"backbone.*": "slow"}, r"'backbone\.\*' is 'slow', expected 'frozen' or lr"),
    ],
)
def test_rules_without_effect_are_errors(rules, message):
    with pytest.raises(ValueError, match=message):
        module(rules)


def test_rates_are_checked():
    with pytest.raises(ValueError, match=r"Rate\.lr is 0\.0"):
        Rate(lr=0.0)
    with pytest.raises(ValueError, match=r"Rate\.weight_decay is -1"):
        Rate(weight_decay=-1)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_frozen_encoders_run_without_a_graph(is_frozen, monkeypatch):
    made = module({"encoders.*": "frozen"} if is_frozen else None)
    encoder, seen = made.model.encoders["image"], []
    forward = encoder.forward

    def watched(items):
        seen.append(torch.is_grad_enabled())
        return forward(items)

    monkeypatch.setattr(encoder, "forward", watched)
    image = encoder.prepare(torch.rand(3, 32, 32))
    (embedding,) = made.model.encode("image", [image])
    assert seen == [not is_frozen]
    assert embedding.requires_grad  # the adapter is trained
    embedding.sum().backward()
    assert all(p.grad is not None for p in made.model.adapters.parameters())
    assert all((p.grad is None) == is_frozen for p in encoder.parameters())


def test_frozen_parts_stay_in_eval_mode():
    made = module({"encoders.*": "frozen", "backbone.blocks.0.*": "frozen"})
    for _ in range(2):
        assert not any(m.training for m in made.model.encoders["image"].modules())
        assert not any(m.training for m in made.model.backbone.blocks[0].modules())
        assert made.model.backbone.blocks[1].training
        assert made.model.adapters["image"].training
        made.train()
    made.eval()
    assert not any(m.training for m in made.modules())


def test_dropout_of_a_partly_frozen_module_stays_on():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Linear(2, 2))
    tune.freeze(model, {"1.*": "frozen"})
    tune.set_frozen_to_eval(model.train())
    assert model[0][1].training
    assert not model[1].training


def test_layer_decay_lowers_the_rate_towards_the_embedding():
    made = module({"adapters.*": Rate(lr=5e-4)}, optimizer=AdamW(lr=1e-3, layer_decay=0.5))
    rates = {name: lr for names, lr, _ in groups(made).values() for name in names}
    assert set(rates) == names(made)
    expected = {
        "backbone.embed.": 1e-3 / 8,
        "backbone.blocks.0.": 1e-3 / 4,
        "backbone.blocks.1.": 1e-3 / 2,
        "backbone.norm.": 1e-3,
        "backbone.out.": 1e-3,
        "encoders.": 1e-3,
        "adapters.": 5e-4,
    }
    for prefix, rate in expected.items():
        assert {rates[name] for name in names(made, prefix)} == {rate}, prefix
    decays = {name: decay for name, (_, _, decay) in groups(made).items()}
    assert decays["default, rate * 0.125"] == AdamW().weight_decay
    assert decays["default, rate * 0.25 (no decay)"] == 0.0


def test_layer_decay_multiplies_the_rates_of_rules():
    rules = {"*": "frozen", "backbone.blocks.*": Rate(lr=1e-4)}
    found = groups(module(rules, optimizer=AdamW(layer_decay=0.5)))
    assert {lr for _, lr, _ in found.values()} == {5e-5, 2.5e-5}


def test_layer_decay_without_effect_is_an_error():
    made = module({"backbone.*": "frozen"}, optimizer=AdamW(layer_decay=0.5))
    with pytest.raises(ValueError, match=r"layer_decay=0\.5 has no effect, as tune trains neither"):
        groups(made)
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match="layer_decay"):
            AdamW(layer_decay=wrong)
