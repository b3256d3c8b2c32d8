"""The public functions on every system in LLaVA's layout: images of mixed sizes and numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmdlm
from mmdlm.decoding.guidance.suppress import Suppress
from mmdlm.model import MultimodalDLM
from tests.systems import llava_layouts
from tests.systems.llava_golden import WRITTEN, asked

pytestmark = pytest.mark.filterwarnings("ignore:.* filled the canvas", "ignore:.* changes nothing")
SYSTEMS = ("lavida", "lavida_dream", "llada_v", "sdar_vl")
SIZES = [(60, 40), (33, 97), (120, 54)]


@pytest.fixture(scope="module", params=SYSTEMS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> MultimodalDLM:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    found = mmdlm.load(getattr(llava_layouts, request.param)(folder), device="cpu")
    assert found.system == request.param
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, made = tmp_path_factory.mktemp("images"), []
    for i, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        made.append(root / f"{i}.png")
    return made


def test_a_batch_of_conversations_equals_each_alone(
    model: MultimodalDLM, images: list[Path]
) -> None:
    first = asked(images[0], "What is it?")
    said = {"role": "assistant", "content": "A cat."}
    conversations = [
        first,
        asked(images[1], "and", images[2], "differ how?"),
        [*first, said, *asked(images[2], "And this?")],
        asked("No image here."),
    ]
    run = {"length": 6, "details": True}
    both = mmdlm.answer(model, conversations, **run)
    for found, one in zip(both, conversations, strict=True):
        alone = mmdlm.answer(model, one, **run)
        assert (found.tokens, found.step) == (alone.tokens, alone.step)
    chat = mmdlm.generate(model, conversations[2], **run)
    assert chat.tokens == both[2].tokens


def test_captions_and_infills_of_a_list_equal_those_of_each(
    model: MultimodalDLM, images: list[Path]
) -> None:
    captions = mmdlm.caption(model, images, length=6)
    assert captions == [mmdlm.caption(model, image, length=6) for image in images]
    texts = mmdlm.infill(model, "A [MASK:3] on [MASK:2].", images, prompt="Describe.")
    assert texts == [
        mmdlm.infill(model, "A [MASK:3] on [MASK:2].", image, prompt="Describe.")
        for image in images
    ]
    assert all(text.startswith("A ") and " on " in text for text in texts)


def test_an_answer_is_cut_at_a_stop(model: MultimodalDLM, images: list[Path]) -> None:
    others = set(range(len(WRITTEN), model.spec.transformer.vocab)) - {model.spec.mask_id}
    run = {"length": 8, "strategies": [Suppress(tuple(others))], "details": True}
    plain = mmdlm.answer(model, "Which?", images[0], **run)
    text = model.tokenizer.decode(list(plain.tokens))
    assert len(text) == 8
    first = plain.step.index(0)
    found = mmdlm.answer(model, "Which?", images[0], stop=[text[first], "not there"], **run)
    assert text[first] not in found.text
    assert len(found.tokens) <= first
    assert found.forwards <= plain.forwards
    with pytest.raises(ValueError, match="stop is 'x', expected a list of texts"):
        mmdlm.answer(model, "Which?", images[0], stop="x")


def test_choices_are_scored(model: MultimodalDLM, images: list[Path]) -> None:
    found = mmdlm.answer(model, "Which?", images[0], choices=["cat", "dog"], details=True)
    assert found.text in ("cat", "dog")
    assert sum(found.probabilities.values()) == pytest.approx(1)
