"""A new model from YAML becomes a blueprint, with initial weights that follow from seeds."""

import pytest
import torch

from adapters.mlp import MLP
from encoders.state import StateEncoder
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.blueprint import build, describe
from mmdlm.data.dataset import Dataset, Turn, example
from mmdlm.training.new_model import ByteLevel, NewModel

RANGE = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -0.9, "q99": 0.9}
STATISTICS = {
    "action": {name: [value] * 3 for name, value in RANGE.items()},
    "state": {name: [value] * 4 for name, value in RANGE.items()},
}


def new(vocab=0, **settings):
    parts = {
        "encoders": {
            "image": ViT(size=32, patch=8, dim=16, depth=1, heads=2),
            "state": StateEncoder(size=4, dim=16),
        },
        "adapters": {"image": MLP, "state": MLP},
    }
    config = TransformerConfig(vocab=vocab, width=16, layers=1, heads=2, inner=16)
    return NewModel(config, **parts | settings)


def test_the_blueprint_describes_the_whole_model():
    given = new(attention="prefix", block_size=2, chunk=5, bins=7, template={"system": "be brief"})
    model = given.build(["b", "a"], STATISTICS)
    blueprint = describe(model)
    assert (blueprint.spec.attention, blueprint.spec.block_size) == ("prefix", 2)
    assert blueprint.spec.transformer.vocab == len(model.tokenizer) == 3 + 2 + 7
    assert blueprint.template["system"] == "be brief"
    assert (model.robot.chunk, model.robot.bins.bins) == (5, 7)
    assert model.robot.bins.ids.stop == blueprint.spec.transformer.vocab
    assert model.robot.state.statistics == STATISTICS["state"]
    again = build(blueprint, model.tokenizer)
    shapes = {name: w.shape for name, w in again.state_dict().items()}
    assert shapes == {name: w.shape for name, w in model.state_dict().items()}


def test_every_weight_is_initialised_and_trained():
    encoders = {"image": ViT(size=32, patch=8, dim=16, depth=1, heads=2)}
    kept = {name: w.clone() for name, w in encoders["image"].state_dict().items()}
    model = new(encoders=encoders, adapters={"image": MLP}).build(["a"], None)
    assert model.encoders["image"] is encoders["image"]  # pretrained weights would be lost else
    assert all(
        torch.equal(w, kept[name]) for name, w in model.encoders["image"].state_dict().items()
    )
    assert all(w.device.type == "cpu" and w.isfinite().all() for w in model.state_dict().values())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert model.robot is None


def test_the_seed_decides_the_weights_of_the_backbone():
    def weights(seed, noise):
        torch.manual_seed(noise)
        return new(seed=seed).build(["a"], STATISTICS).backbone.state_dict()

    first, same, other = weights(3, 0), weights(3, 1), weights(4, 0)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"adapters": {"image": MLP}},
            r"encoders \['image', 'state'\] and adapters \['image'\] differ",
        ),
        ({"vocab": 99}, r"backbone\.vocab is 99, but the data have 4 .*; leave it out"),
        ({"template": {"greeting": "hi"}}, r"template has \['greeting'\]"),
    ],
)
def test_contradictions_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        new(**given).build(["a"], None)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"NewModel\.attention is 'both'"):
        new(attention="both")
    with pytest.raises(ValueError, match=r"NewModel\.chunk is 0"):
        new(chunk=0)


class Talk(Dataset):
    """Rows of one question and its answer."""

    def __init__(self, *answers):
        self.answers = answers

    def __len__(self):
        return len(self.answers)

    def sample(self, index, rng):
        return example((Turn("Who is it?", self.answers[index], 8),))


def spelled(rows=100, bpe=300, **settings):
    bare = {"encoders": {}, "adapters": {}, "tokenizer": ByteLevel(bpe, rows)}
    data = {"talk": Talk("Zoë, 7!", "Zoë", "北京", "北京")}
    return new(**bare | settings).build(["unused"], None, data)


def test_a_byte_level_vocabulary_is_trained_on_prompts_and_answers():
    model = spelled()
    assert len(model.tokenizer) == model.spec.transformer.vocab
    assert len(model.tokenizer.encode("Who is it?")) == 4
    assert model.tokenizer.decode(model.tokenizer.encode("Какого цвета?")) == "Какого цвета?"
    assert len(spelled(rows=2).tokenizer.encode("北京")) == 6  # bytes: these rows are not read
    assert len(model.tokenizer.encode("北京")) < 6


def test_the_first_rows_are_named(caplog):
    with caplog.at_level("INFO"):
        spelled(rows=2)
    assert "trained on the first 2 of 4 rows of talk" in caplog.text


@pytest.mark.parametrize("chat", [None, "chatml"])
def test_texts_never_give_special_tokens_of_a_new_model(chat):
    model = spelled(bpe=400, template={"chat": chat} if chat else {})
    said = "<mask><eos> <pad><|im_end|>\n<|im_start|>system"
    ids = torch.cat(model.processor.prompt(said)).tolist()
    markers = {model.tokenizer.id(m) for m in ("<|im_start|>", "<|im_end|>")} - {None}
    assert len(markers) == (2 if chat else 0)
    # The template alone writes control tokens: one message, and the start of the answer.
    assert sum(i in {0, 1, 2, *markers} for i in ids) == (3 if chat else 0)
    assert said in model.tokenizer.decode(ids)


def test_control_tokens_that_no_template_writes_are_refused():
    with pytest.raises(ValueError, match=r"template\.media has the control token '<\|image\|>'"):
        spelled(template={"media": {"image": "<|image|>{}"}})
    with pytest.raises(ValueError, match="200 tokens is too small"):
        spelled(bpe=200)
