import pytest
import torch

import mmdlm
from mmdlm.tasks.infill import parse


def test_known_words_stay_and_slots_are_filled(model, pictures):
    found = mmdlm.infill(model, "A [MASK] circle ,  left of [MASK:2] square", image=pictures[0])
    assert found.startswith("A ")
    assert " circle ,  left of " in found
    assert found.endswith("square")
    assert "[MASK" not in found
    assert "<" not in found


def test_list_gives_what_each_text_gives_alone(model, pictures):
    texts = ["a [MASK] circle", "[MASK] circle left of a [MASK] square", "the [MASK:3]"]
    together = mmdlm.infill(model, texts, image=pictures[0])
    assert together == [mmdlm.infill(model, text, image=pictures[0]) for text in texts]
    model.preset = {}  # canvases of unequal length cannot share a batch
    together = mmdlm.infill(model, texts, image=pictures[0])
    assert together == [mmdlm.infill(model, text, image=pictures[0]) for text in texts]


def test_many_pictures_with_one_text(model, pictures, encoded):
    found = mmdlm.infill(model, "a [MASK] circle", pictures)
    assert encoded == [5]
    assert found == [mmdlm.infill(model, "a [MASK] circle", one) for one in pictures]


def test_details_tell_known_from_filled(model, pictures):
    answer = mmdlm.infill(model, "a [MASK] circle [MASK]", pictures[0], details=True)
    known = [model.tokenizer.id("a"), model.tokenizer.id("circle")]
    assert [answer.tokens[0], answer.tokens[2]] == known
    assert [answer.step[0], answer.step[2]] == [-1, -1]
    assert {answer.step[1], answer.step[3]} == {0, 1}
    assert answer.forwards == 2
    assert not answer.truncated


def test_text_before_the_first_slot_stands_in_for_a_prompt(model):
    model.preset = {}
    assert mmdlm.infill(model, "the circle is [MASK]").startswith("the circle is")
    with pytest.raises(ValueError, match="nothing stands before"):
        mmdlm.infill(model, "[MASK] circle")
    assert mmdlm.infill(model, "[MASK] circle", prompt="say it").endswith("circle")


def test_slots_are_parsed():
    cut = parse("a [MASK] b[MASK:12]")
    assert cut.texts == ("a ", " b", "")
    assert cut.sizes == (1, 12)


@pytest.mark.parametrize(
    ("template", "message"),
    [("a circle", "no slot"), ("a [MASK:0]", "no tokens"), ("a [MASK] dragon", "dragon")],
)
def test_bad_templates_are_refused(model, template, message):
    with pytest.raises(ValueError, match=message):
        mmdlm.infill(model, template)


def test_template_longer_than_its_canvas_is_refused(model, pictures):
    with pytest.raises(ValueError, match="4 tokens, the canvas 3"):
        mmdlm.infill(model, "a [MASK] circle [MASK]", pictures[0], length=3)
    long = "a circle and a square and a circle and [MASK]"
    assert mmdlm.infill(model, long, pictures[0]).startswith("a circle and a square")


def test_slots_hold_as_many_tokens_as_they_say(model, pictures):
    with torch.no_grad():  # a model that would rather end than say anything
        model.backbone.out.weight[model.spec.eos_id] *= 50
    for one in pictures:
        answer = mmdlm.infill(model, "a [MASK:3] circle [MASK]", one, details=True)
        assert len(answer.tokens) == 6
        assert model.spec.eos_id not in answer.tokens
