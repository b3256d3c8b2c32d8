import pytest
import torch

import mmdlm
import mmdlm.tasks.infill as module
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.tasks.generate import Filled
from mmdlm.tasks.infill import parse


def test_known_words_are_kept_and_slots_filled(model, images):
    found = mmdlm.infill(model, "A [MASK] circle ,  left of [MASK:2] square", image=images[0])
    assert found.startswith("A ")
    assert " circle ,  left of " in found
    assert found.endswith("square")
    assert "[MASK" not in found
    assert "<" not in found


def test_list_equals_single_texts(model, images):
    texts = ["a [MASK] circle", "[MASK] circle left of a [MASK] square", "the [MASK:3]"]
    together = mmdlm.infill(model, texts, image=images[0])
    assert together == [mmdlm.infill(model, text, image=images[0]) for text in texts]
    model.preset = {}  # canvases of unequal length cannot share a batch
    together = mmdlm.infill(model, texts, image=images[0])
    assert together == [mmdlm.infill(model, text, image=images[0]) for text in texts]


def test_list_of_images_with_one_text(model, images, encoded):
    found = mmdlm.infill(model, "a [MASK] circle", images)
    assert encoded == [5]
    assert found == [mmdlm.infill(model, "a [MASK] circle", one) for one in images]


def test_details_distinguish_known_from_filled(model, images):
    answer = mmdlm.infill(model, "a [MASK] circle [MASK]", images[0], details=True)
    known = [model.tokenizer.id("a"), model.tokenizer.id("circle")]
    assert [answer.tokens[0], answer.tokens[2]] == known
    assert [answer.step[0], answer.step[2]] == [-1, -1]
    assert {answer.step[1], answer.step[3]} == {0, 1}
    assert answer.forwards == 2
    assert not answer.truncated


def test_text_before_the_first_slot_is_the_prompt(model):
    model.preset = {}
    assert mmdlm.infill(model, "the circle is [MASK]").startswith("the circle is")
    assert mmdlm.infill(model, "[MASK] circle", prompt="say it").endswith("circle")


def test_the_first_word_of_a_text_is_filled_in(speller):
    model = speller()
    answer = mmdlm.infill(model, "[MASK] is the capital", details=True)
    assert answer.text.endswith(" is the capital")
    canvas = torch.tensor([[model.spec.mask_id, *model.tokenizer.encode(" is the capital")]])
    logits = model.logits(canvas)[0, 0]
    logits[[model.spec.mask_id, model.spec.eos_id]] = -torch.inf
    assert answer.tokens[0] == logits.argmax()


def test_white_space_of_text_and_slots_is_kept(speller, monkeypatch):
    """The text is that of the tokens; the one space before a slot belongs to its first token."""
    model, spoken = speller(), iter("")

    def fill(model, examples, *args, **options):
        return [filled(model, example, next(spoken)) for example in examples]

    def filled(model, example, said):
        canvas = model.processor.canvas(example.messages).tolist()
        ids = iter(model.tokenizer.encode(said))
        tokens = [next(ids) if token == model.spec.mask_id else token for token in canvas]
        return Filled(tokens, [0] * len(tokens), [1.0] * len(tokens), 1, 0.0)

    monkeypatch.setattr(module, "fill", fill)
    for template, said, wanted in (
        ("def f(x):\n[MASK:7]x", "    ret", "def f(x):\n    retx"),
        ("def f(x):\n    [MASK:3]", " if", "def f(x):\n    if"),
        ("a [MASK:4] b", " red", "a red b"),
        ("a [MASK:4]b", "red\n", "a red\nb"),
        ("[MASK:3] b", "  a", "  a b"),
    ):
        spoken = iter([said])
        assert mmdlm.infill(model, template) == wanted
    texts = [model.processor.encode("def f(x):\n   "), "[MASK:3]"]
    example, _ = module._example(model, parse("def f(x):\n    [MASK:3]"), None, (), None, None)
    assert example.messages[0].parts[0].text.equal(texts[0])


def test_coarse_strategies_are_named_only_where_the_length_is_given(model, recwarn):
    model.preset = {}
    text = "the circle is [MASK]" + " left of the square" * 10
    mmdlm.infill(model, text, strategies=[Blocks(32)])
    assert not [w for w in recwarn if "changes nothing" in str(w.message)]
    with pytest.warns(UserWarning, match=r"Blocks\(size=32\) changes nothing in an answer of 20"):
        mmdlm.infill(model, "a [MASK]", length=20, strategies=[Blocks(32)])


def test_slots_are_parsed():
    cut = parse("a [MASK] b[MASK:12]")
    assert cut.texts == ("a ", " b", "")
    assert cut.sizes == (1, 12)


@pytest.mark.parametrize(
    ("template", "message"),
    [("a circle", "no slot"), ("a [MASK:0]", "slot of 0 tokens"), ("a [MASK] dragon", "dragon")],
)
def test_invalid_templates_are_rejected(model, template, message):
    with pytest.raises(ValueError, match=message):
        mmdlm.infill(model, template)


def test_template_longer_than_its_canvas_is_rejected(model, images):
    with pytest.raises(ValueError, match="length is 3, but the template has 4 tokens"):
        mmdlm.infill(model, "a [MASK] circle [MASK]", images[0], length=3)
    long = "a circle and a square and a circle and [MASK]"
    assert mmdlm.infill(model, long, images[0]).startswith("a circle and a square")


def test_slots_have_the_given_number_of_tokens(model, images):
    with torch.no_grad():  # a model that prefers end tokens
        model.backbone.out.weight[model.spec.eos_id] *= 50
    for one in images:
        answer = mmdlm.infill(model, "a [MASK:3] circle [MASK]", one, details=True)
        assert len(answer.tokens) == 6
        assert model.spec.eos_id not in answer.tokens
