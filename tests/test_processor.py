"""Processor: messages to token ids, preprocessed media and canvases."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import mmdlm
from encoders.features import Prepared
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.chat import Template
from mmdlm.messages import RAW, Example, Media, Message, Slot, Text, assistant, user
from mmdlm.processor import MediaCache, Processor

MARKERS = ["<|im_start|>", "<|im_end|>", "<|vision|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\\n' }}"
)


def image(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture
def build(speller):
    def make(template=None, markers=MARKERS, **options):
        model = speller(markers, **options)
        inputs = {"image": ViT.tiny().preprocess}
        return Processor(model.spec, model.tokenizer, inputs, template=template)

    return make


def shown(processor, parts):
    """Prompt parts as text, with the kind of media in braces."""
    decode = processor.tokenizer.backend.decode
    return "".join(
        f"{{{part.kind}}}"
        if isinstance(part, Media | Prepared)
        else decode(part.tolist(), skip_special_tokens=False)
        for part in parts
    )


def test_media_keep_their_place_in_the_message(build):
    processor = build(Template(CHATML, {"image": "<|vision|>{}\n"}))
    messages = (
        user("first ", Media("image", image(0)), "then ", Media("image", image(1)), "which?"),
        assistant("the second"),
        user("sure?"),
    )
    found = shown(processor, processor.prompt(messages))
    assert found == (
        "<|im_start|>user\nfirst <|vision|>{image}\nthen <|vision|>{image}\nwhich?<|im_end|>\n"
        "<|im_start|>assistant\nthe second<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_control_tokens_are_encoded_around_media_but_not_in_texts(build):
    processor = build(Template(CHATML, {"image": "<|vision|>{}"}))
    vision = processor.tokenizer.id("<|vision|>")
    parts = processor.prompt((user(Media("image", image(0)), "is <|vision|> here?"),))
    ids = [i for part in parts if not isinstance(part, Media) for i in part.tolist()]
    assert ids.count(vision) == 1


def test_default_system_message_can_be_replaced(build):
    processor = build(Template(CHATML, system="Be brief."))
    assert "<|im_start|>system\nBe brief.<|im_end|>" in shown(processor, processor.prompt("hi"))
    own = (Message("system", (Text("Be long."),)), user("hi"))
    found = shown(processor, processor.prompt(own))
    assert "Be long." in found
    assert "Be brief." not in found


def test_raw_messages_are_encoded_without_a_template(build):
    processor = build(Template(CHATML, {"image": "<|vision|>{}"}, "Be brief."))
    before, after = (Text(torch.tensor(ids)) for ids in ([5, 6], [7]))
    raw = Message(RAW, (before, Media("image", image(0)), after))
    first, medium, last = processor.prompt((raw,))
    assert (first.tolist(), last.tolist()) == ([5, 6], [7])
    assert isinstance(medium, Media)


def test_mask_token_is_rejected_in_every_part(build):
    processor = build(Template(CHATML))
    mask = processor.spec.mask_id
    for messages in (
        (user("a <|mask|> b"),),
        (user("a"), assistant("<|mask|>"), user("b")),
        (Message("system", (Text("<|mask|>"),)), user("b")),
        (Message(RAW, (Text(torch.tensor([1, mask])),)),),
    ):
        with pytest.raises(ValueError, match="holds the mask token"):
            processor.prompt(messages)


def test_several_messages_need_a_template(build):
    processor = build(markers=())
    with pytest.raises(ValueError, match="no chat template"):
        processor.prompt((user("a"), assistant("b"), user("c")))


def test_canvas_has_text_masks_and_answers(build):
    processor = build()
    mask, eos = processor.spec.mask_id, processor.spec.eos_id
    known = processor.encode("ab").tolist()
    canvas = processor.canvas((user("q"), assistant("ab", Slot(length=2), Slot("text", 3, "ab"))))
    assert canvas.tolist() == [*known, mask, mask, *known, eos]
    with pytest.raises(ValueError, match="has 2 tokens, but its slot only 1"):
        processor.canvas((assistant(Slot("text", 1, "ab")),))
    with pytest.raises(ValueError, match="no length"):
        processor.canvas((assistant(Slot()),))
    with pytest.raises(ValueError, match="output is 'actions', expected one of text"):
        processor.canvas((assistant(Slot("actions", 1)),))


def test_item_used_twice_is_read_once(build):
    processor = build()
    calls = []
    inner = processor.inputs["image"]
    processor.inputs["image"] = lambda item: calls.append(1) or inner(item)
    pixels = image(0)
    examples = [Example((user(Media("image", pixels), text),)) for text in ("a", "b")]
    cache = MediaCache(examples)
    packed = [processor.pack([example], cache) for example in examples]
    assert len(calls) == 1
    assert packed[0].rows[0].items[0] is packed[1].rows[0].items[0]
    assert not cache.prepared


def test_inputs_may_preprocess_several_items_differently(build):
    class Tiles:
        def __call__(self, item):
            return Prepared("image", torch.zeros(5, 3, 4, 4))

        def several(self, item):
            return Prepared("image", torch.zeros(3, 4, 4))

    processor = build()
    processor.inputs["image"] = Tiles()
    one = Example((user(Media("image", image(0)), "a"),))
    two = Example((user(Media("image", image(0)), Media("image", image(1)), "a"),))
    packed = processor.pack([one, two])
    assert [item.tensor.ndim for item in packed.rows[0].items] == [4]
    assert [item.tensor.ndim for item in packed.rows[1].items] == [3, 3]


def test_errors_name_the_item(build):
    processor = build()
    bad = np.zeros((5, 6, 7), np.uint8)
    examples = [Example((user(Media("image", one), "a"),)) for one in (image(0), bad)]
    with pytest.raises(ValueError, match="image") as caught:
        processor.pack(examples)
    assert "item 1" in caught.value.__notes__[0]


def test_processor_can_be_pickled_without_weights():
    processor = mmdlm.load("tiny").processor
    data = pickle.dumps(processor)
    assert len(data) < 100_000
    asked = user(Media("image", image(0)), "describe the picture")
    example = Example((asked, assistant(Slot(length=4))))
    first, second = (each.pack([example]).rows[0] for each in (processor, pickle.loads(data)))
    assert torch.equal(first.items[0].tensor, second.items[0].tensor)
    assert torch.equal(first.turns[0].answer, second.turns[0].answer)


def test_several_images_in_one_question_and_in_several_turns():
    model = mmdlm.load("tiny")
    pictures = [image(seed) for seed in range(2)]
    content = [
        {"type": "image", "image": pictures[0]},
        {"type": "image", "image": pictures[1]},
        {"type": "text", "text": "what colour is the circle ?"},
    ]
    messages = [{"role": "user", "content": content}]
    one = mmdlm.answer(model, messages, details=True)
    single = mmdlm.answer(model, "what colour is the circle ?", pictures[0], details=True)
    both = mmdlm.answer(model, [messages, messages], details=True)
    assert [each.tokens for each in both] == [one.tokens] * 2
    assert one.confidence != single.confidence  # the second image changes the output
    with pytest.raises(ValueError, match="put the image into its messages"):
        mmdlm.answer(model, messages, pictures[0])


def test_attention_decides_whether_branches_share_a_row():
    config = TransformerConfig(vocab=8, width=8, layers=1, heads=1, inner=8)
    answers = tuple((assistant(Slot(value=torch.tensor([3, 4]))),) for _ in range(2))
    shared = (Message(RAW, (Media("state", Prepared("state", torch.zeros(2))),)),)
    for attention, rows in (("cascade", 1), ("full", 2)):
        spec = Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0, attention=attention)
        packed = Processor(spec).pack([Example(shared, answers)])
        assert len(packed.rows) == rows
        assert packed.example == (0,) * rows
        assert packed.branch == tuple(range(rows))
