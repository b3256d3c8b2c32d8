import math

import pytest
import torch

import mmdlm
import mmdlm.decoding.start
from mmdlm.layout import Row

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas")
QUESTIONS = ["what is it ?", "is it red ?", "is the circle left of the square ?"]


def test_list_of_questions_about_one_image(model, images, encoded):
    found = mmdlm.answer(model, QUESTIONS, image=images[0])
    assert encoded == [1]
    assert found == [mmdlm.answer(model, q, image=images[0]) for q in QUESTIONS]


def test_kept_features_are_not_encoded_again(model, images, encoded):
    features = {}
    asked = {"image": images[0], "features": features}
    found = [mmdlm.answer(model, question, **asked) for question in QUESTIONS]
    chosen = mmdlm.answer(model, QUESTIONS[1], choices=["yes", "no"], **asked)
    assert encoded == [1]
    assert len(features) == 1
    assert found == mmdlm.answer(model, QUESTIONS, images[0])
    assert chosen == mmdlm.answer(model, QUESTIONS[1], images[0], choices=["yes", "no"])
    mmdlm.answer(model, QUESTIONS[0], images[1], features=features)
    assert len(features) == 2


def test_one_question_about_a_list_of_images(model, images):
    found = mmdlm.answer(model, QUESTIONS[0], images=images)
    assert found == [mmdlm.answer(model, QUESTIONS[0], image=one) for one in images]
    assert found == mmdlm.answer(model, QUESTIONS[0], images)


def test_lists_of_equal_length_are_paired(model, images):
    found = mmdlm.answer(model, QUESTIONS, images[:3], batch_size=2)
    pairs = zip(QUESTIONS, images, strict=False)
    assert found == [mmdlm.answer(model, q, one) for q, one in pairs]


def test_question_without_an_image(model):
    assert isinstance(mmdlm.answer(model, QUESTIONS[0]), str)


def test_prompt_wraps_the_question(model):
    wrapped = mmdlm.answer(model, "is it red", prompt="say , {question} ?")
    assert wrapped == mmdlm.answer(model, "say , is it red ?")
    with pytest.raises(ValueError, match="{question}"):
        mmdlm.answer(model, "is it red", prompt="say")


def test_lists_of_unequal_length_are_rejected(model, images):
    with pytest.raises(ValueError, match="3 questions and 2 images"):
        mmdlm.answer(model, QUESTIONS, images[:2])
    with pytest.raises(ValueError, match="not both"):
        mmdlm.answer(model, QUESTIONS, images[0], images=images)
    with pytest.raises(ValueError, match="question is ''"):
        mmdlm.answer(model, "", images[0])


def slow_probabilities(model, question, image, choices, size):
    """Slow reference: one row, position and choice at a time, in float64."""
    media = model.encode("image", [model.processor.prepare("image", image)])[0]
    prompt = model.prompt(question)
    row = model.arrange([Row((media, prompt))])
    decoded = torch.full((size,), model.spec.mask_id)
    state = mmdlm.decoding.start.start(model, row, size, None, None, None, decoded[None])
    hidden = model.backbone.head(model.hidden(state.sequence))[0].double()
    totals = []
    for choice in choices:
        ids = model.tokenizer.encode(choice)
        ids = ids + [model.spec.eos_id] * (size - len(ids))
        total = 0.0
        for i, token in enumerate(ids):
            position = state.prompt + i - (1 if model.spec.shift else 0)
            scores = hidden[position].tolist()
            scores[model.spec.mask_id] = -math.inf
            total += scores[token] - math.log(sum(math.exp(s) for s in scores))
        totals.append(total)
    weights = [math.exp(total - max(totals)) for total in totals]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("attention", ["cascade", "full"])
@pytest.mark.parametrize("shift", [False, True])
def test_choices_match_a_slow_reference(make_model, images, attention, shift):
    import mmdlm.decoding.decode

    model = make_model(attention=attention, shift=shift)
    choices = ["yes", "no", "a red circle"]
    found = mmdlm.answer(model, QUESTIONS, images[:3], choices=choices, details=True)
    for question, image, answer in zip(QUESTIONS, images, found, strict=False):
        with torch.no_grad():
            wanted = slow_probabilities(model, question, image, choices, 4)
        assert list(answer.probabilities) == choices
        assert list(answer.probabilities.values()) == pytest.approx(wanted, abs=1e-5)
        assert sum(answer.probabilities.values()) == pytest.approx(1)
        assert answer.text == choices[wanted.index(max(wanted))]
        assert answer.forwards == 1
        assert len(answer.tokens) == len(answer.confidence) == len(answer.words)


def test_choices_take_one_forward_per_batch(model, images, monkeypatch):
    calls = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda s, at: calls.append(len(s.tokens)) or hidden(s, at))
    found = mmdlm.answer(model, "is it red ?", images, choices=["yes", "no"], batch_size=3)
    assert calls == [3, 2]
    assert set(found) <= {"yes", "no"}


def test_choices_without_default_length_end_with_one_end_token(model, images):
    model.preset = {}
    answer = mmdlm.answer(model, "is it ?", images[0], choices=["yes", "a circle"], details=True)
    assert set(answer.probabilities) == {"yes", "a circle"}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["yes"], "two or more"),
        (["yes", "yes"], "distinct"),
        ("yes", "distinct"),
        (["yes", " "], "empty"),
        (["yes", "maybe"], "'maybe'"),
    ],
)
def test_invalid_choices_are_rejected(model, images, choices, message):
    with pytest.raises(ValueError, match=message):
        mmdlm.answer(model, "is it red ?", images[0], choices=choices)


def test_choice_longer_than_the_canvas_is_rejected(model, images):
    with pytest.raises(ValueError, match="length is 2, but a choice has 3 tokens"):
        mmdlm.answer(model, "is it ?", images[0], choices=["yes", "a red circle"], length=2)
