"""Plans of a driving model: a JSON scaffold that always parses, and training on it."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import mmdlm
from adapters.pixel_shuffle import PixelShuffle
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.data.chat import Chat
from mmdlm.data.collate import batch, collate
from mmdlm.messages import Example, Media, Slot, assistant, user
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.masked import Masked
from mmdlm.tasks.drive import LATERAL, LONGITUDINAL, OBJECTS, SCHEMA, Plan, plan, prompt
from mmdlm.tasks.scaffold import scaffold
from mmdlm.tasks.scaffold_data import Scaffolds
from mmdlm.text import Tokenizer

PLAN = {
    "critical_objects": dict.fromkeys(OBJECTS, "no") | {"left_vehicle": "yes"},
    "explanation": 'slow "down", the left lane is full',
    "future_meta_behavior": {"longitudinal": "decelerate", "lateral": "right"},
    "trajectory": [[24.5, 0.4], [48.0, 3.9], [71.1, 4.0], [94.0, 4.0], [117.0, -4.0]],
}
HISTORY = [(-12.5 * i, -0.04 * i, 25.0, -0.2) for i in range(6, -1, -1)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two rows of three images each, as `mmdlm.data.chat` reads them."""
    root = tmp_path_factory.mktemp("driving")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    row = {"images": ["0.png", "1.png", "2.png"], "question": prompt(HISTORY)}
    lines = [row | {"answer": json.dumps(PLAN, indent=2)}] * 2
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root / "rows.jsonl"


@pytest.fixture(scope="module")
def build(data):
    """build(seed): a model with random weights and a tokenizer trained on the data."""

    def make(seed: int = 0, **spec) -> MultimodalDLM:
        rows = Scaffolds(Chat(data), SCHEMA)
        tokenizer = Tokenizer.from_texts(rows.texts(0) * 2, 600)
        config = TransformerConfig(vocab=len(tokenizer), width=32, layers=1, heads=2, inner=48)
        ids = {"mask_id": 2, "eos_id": 1, "pad_id": 0, "attention": "prefix"}
        torch.manual_seed(seed)
        encoders = {"image": ViT(size=16, patch=4, dim=24, depth=1, heads=2)}
        adapters = {"image": PixelShuffle(24, 32, factor=2, layers=1)}
        model = MultimodalDLM(Spec("mmdlm", config, **ids | spec), encoders, adapters, tokenizer)
        model.backbone.reset(torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for weight in model.backbone.parameters():
                weight *= (1, 4, 12)[seed % 3] if weight.ndim > 1 else 1
        return model.eval()

    return make


def scenes(count: int) -> list:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(3)]
    return [(images, prompt([(x, y, v - i, a) for x, y, v, a in HISTORY])) for i in range(count)]


@pytest.mark.filterwarnings("ignore:values were changed")
@pytest.mark.parametrize(
    ("seed", "strategies"),
    [(0, None), *((i, name) for i in range(3) for name in ("one_step", "parallel", "turbo"))],
)
def test_plans_of_random_weights_are_complete(build, seed, strategies) -> None:
    found = plan(build(seed), scenes(3), strategies=strategies, seed=seed)
    for one in found:
        value = json.loads(one.answer.text)
        assert one.value == value
        assert list(value) == list(SCHEMA["properties"])
        assert list(value["critical_objects"]) == list(OBJECTS)
        assert set(value["critical_objects"].values()) <= {"yes", "no"}
        assert isinstance(value["explanation"], str)
        assert value["future_meta_behavior"]["longitudinal"] in LONGITUDINAL
        assert value["future_meta_behavior"]["lateral"] in LATERAL
        assert np.array(value["trajectory"]).shape == (5, 2)
        assert np.isfinite(one.action(20.0, "trajectory")).all()
        assert all(0 <= p <= 1 for p in one.yes.values())
        assert all(
            (p >= 0.5) == (value["critical_objects"][n] == "yes") for n, p in one.yes.items()
        )


def test_images_order_and_history_change_the_plan(build) -> None:
    model = build(2)
    images, text = scenes(1)[0]
    turned = plan(model, [(images, text), (images[::-1], text), (images, text + " ")])
    assert len({json.dumps(one.yes) for one in turned}) == 3
    alone = plan(model, [(images[::-1], text)])[0]
    assert alone.value == turned[1].value


def test_probability_of_yes_is_its_share_of_yes_and_no(build) -> None:
    model, (images, text) = build(1), scenes(1)[0]
    found = plan(model, [(images, text)], strategies="one_step")[0]
    made = scaffold(model, SCHEMA, fence=False)
    media = [Media("image", image) for image in images]
    example = Example((user(*media, text), assistant(Slot(value=made.tokens))))
    sequence = model.embed(model.processor.pack([example]).rows)
    at = torch.zeros_like(sequence.mask)
    start = sequence.tokens.shape[1] - len(made.tokens)
    slots = made.slots[: len(OBJECTS)]
    at[0, [start + slot.start for slot in slots]] = True
    with torch.inference_mode():
        logits = model.logits_at(sequence, at)
    yes, no = (option[0] for option in slots[0].options)
    shares = logits[:, [yes, no]].softmax(-1)[:, 0]
    assert list(found.yes.values()) == pytest.approx(shares.tolist(), abs=1e-5)


def test_yes_and_no_have_slots_of_one_token(build) -> None:
    model = build()
    made = scaffold(model, SCHEMA, fence=False)
    tokenizer = model.tokenizer
    for slot in made.slots[: len(OBJECTS)]:
        assert slot.stop - slot.start == 1
        assert [tokenizer.decode(option) for option in slot.options] == ["yes", "no"]
    assert made.slots[len(OBJECTS)].start > made.slots[len(OBJECTS) - 1].stop  # text between


def test_canvas_of_an_answer_is_read_as_the_answer(build) -> None:
    model = build()
    made = scaffold(model, SCHEMA, fence=False)
    tokens = made.filled(model.tokenizer, PLAN)
    assert made.read(model.tokenizer, tokens.tolist()) == (PLAN, [])
    assert torch.equal(tokens[made.is_known], made.tokens[made.is_known])
    assert not (tokens == model.spec.mask_id).any()
    text = model.tokenizer.decode(tokens.tolist())
    assert '"left_vehicle": "yes",\n' in text
    assert '"trajectory": [[24.5 , 0.4  ], [48.0 , 3.9  ]' in text


KINDS = {
    "properties": {
        "name": {"type": ["string", "null"], "x-tokens": 6},
        "age": {"type": ["integer", "null"], "maximum": 120, "x-tokens": 4},
        "tags": {"type": "array", "items": {"type": "string", "x-tokens": 9}, "maxItems": 2},
        "sure": {"type": "boolean"},
        "kind": {"enum": ["a", "longer text", None, 3]},
        "grid": {
            "type": "array",
            "maxItems": 2,
            "minItems": 2,
            "items": {"type": "array", "maxItems": 2, "minItems": 2, "items": {"type": "integer"}},
        },
        "always": {"const": [1]},
    }
}


@pytest.mark.parametrize("seed", range(8))
def test_values_of_every_kind_survive_the_canvas(speller, seed) -> None:
    rng = random.Random(seed)
    value = {
        "name": rng.choice([None, "Al", "", "Ä"]),
        "age": rng.choice([None, 7, -12, 120]),
        "tags": rng.choice([[], ["x"], ['"q"', "b"]]),
        "sure": rng.choice([True, False]),
        "kind": rng.choice(["a", "longer text", None, 3]),
        "grid": [[1, -2], [rng.randint(-99, 99), 4]],
        "always": [1],
    }
    if value["name"] is None:
        value["name"] = "Al"  # "<none>" does not fit into six bytes with its quote
    model = speller()
    made = scaffold(model, KINDS)
    tokens = made.filled(model.tokenizer, value)
    assert made.read(model.tokenizer, tokens.tolist()) == (value, [])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"explanation": 3}, "explanation is 3, expected a text"),
        ({"explanation": "x y z " * 20}, "explanation .*at most 16 tokens; it has"),
        ({"trajectory": [[1.0, 2.0]]}, "trajectory is .*a list of 5 to 5"),
        ({"trajectory": [["1", 2.0]] * 5}, r"trajectory\[0\]\[0\] is '1', expected a number"),
        ({"trajectory": [[1e30, 2.0]] * 5}, "digits with a sign and a point"),
        ({"critical_objects": dict.fromkeys(OBJECTS, "maybe")}, "'maybe', expected one of"),
        ({"more": 1}, "expected an object of critical_objects"),
    ],
)
def test_values_that_do_not_conform_are_rejected(build, change, error) -> None:
    model = build()
    with pytest.raises(ValueError, match=error):
        scaffold(model, SCHEMA, fence=False).filled(model.tokenizer, PLAN | change)


@pytest.mark.parametrize("row_tokens", [None, 4000])
def test_training_masks_and_learns_the_slots_only(build, data, row_tokens) -> None:
    model = build()
    rows = Scaffolds(Chat(data), SCHEMA).connect(model.processor)
    examples = [rows.sample(i, np.random.default_rng(i)) for i in range(2)]
    seeds, phase = torch.tensor([3, 4]), torch.tensor([0.9, 0.8], dtype=torch.float64)
    made = batch(model, collate(model.processor, examples, seeds, phase, row_tokens))
    canvas = rows.canvas
    slots = int((~canvas.is_known).sum())
    assert int(made.sequence.is_answer.sum()) == 2 * slots
    noise = Masked(full=1.0).corrupt(made if row_tokens is None else made.apart)
    sequence = made.sequence if row_tokens is None else made.packing.apart
    size = len(canvas.tokens)
    assert torch.equal(noise.masked[0, -size:], ~canvas.is_known)
    # All of the answer attends to all of it: the roles differ, the levels do not.
    assert sequence.level[:, -size:].unique().tolist() == [1]
    losses = Masked(full=1.0, weight="one", normaliser="masked").step(model, made)
    assert int(losses.count) == 2 * slots


def test_vocabulary_is_trained_on_what_scaffolds_tokenize(data) -> None:
    texts = Scaffolds(Chat(data), SCHEMA).texts(0)
    assert prompt(HISTORY) in texts
    assert '    "left_vehicle": "' in texts  # the text up to the slot, and its options
    assert {"yes", "no", "decelerate", PLAN["explanation"].replace('"', '\\"')} <= set(texts)
    assert "brake for the vehicle ahead; the left lane is faster" in texts  # an example


def test_acceleration_follows_the_waypoints_and_ignores_one_wrong_digit() -> None:
    def planned(*ahead: float) -> Plan:
        points = [[x, 0.0] for x in ahead]
        return Plan(PLAN | {"trajectory": points}, {}, None)

    speed, brake = 20.0, -3.0
    points = [speed * t + brake * t * t / 2 for t in range(1, 6)]
    assert planned(*points).acceleration(speed) == pytest.approx(brake)
    points[0] += 30
    assert planned(*points).acceleration(speed) == pytest.approx(brake)
    followed = planned(*points).action(speed, "trajectory")
    assert followed.tolist() == [pytest.approx(brake), 1.0]
    assert planned(*points).action(speed).tolist() == [LONGITUDINAL["decelerate"], 1.0]


def test_prompt_has_a_line_per_half_second() -> None:
    lines = prompt(HISTORY).splitlines()
    assert lines[1] == "t-3.0 [-75, -0.2] v 25.0 a -0.2"
    assert lines[-2] == "t-0.0 [0, 0.0] v 25.0 a -0.2"
    assert len(lines) == 9


def test_images_are_given_once(build) -> None:
    model, (images, text) = build(), scenes(1)[0]
    with pytest.raises(ValueError, match="image= or images="):
        mmdlm.infill(model, SCHEMA, images[0], images=images, prompt=text)
    with pytest.raises(ValueError, match="images is empty"):
        mmdlm.infill(model, SCHEMA, images=[], prompt=text)
