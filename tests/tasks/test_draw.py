"""Several images of a text: those of their seeds, and the best of many."""

import numpy as np
import pytest
import torch

import mmdlm
from adapters.image_codes import OPEN
from mmdlm.search.hierarchical import Branch
from mmdlm.tasks.draw import adjusted
from mmdlm.tasks.draw_search import CHOICES, QUESTION, search
from mmdlm.tasks.drawings import Wanted
from tests.systems.test_mmada import published


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mmdlm.load(published(tmp_path_factory.mktemp("mmada")))


def brightness(images, text):
    return [float(np.asarray(image).mean()) for image in images]


def test_images_of_a_text_are_those_of_the_seeds_that_follow(model, monkeypatch):
    sizes, run = [], model.run
    monkeypatch.setattr(
        model,
        "run",
        lambda sequence, *given: sizes.append(len(sequence.tokens)) or run(sequence, *given),
    )
    many = mmdlm.draw(model, "ef", n=5, seed=3, steps=4, details=True)
    assert sizes == [5] * 8  # one batch; with guidance two forwards per step
    for i, one in enumerate(many):
        alone = mmdlm.draw(model, "ef", seed=3 + i, steps=4, details=True)
        assert one.codes.equal(alone.codes)
        assert one.forwards == alone.forwards
    assert len({tuple(one.codes.flatten().tolist()) for one in many}) > 1


def test_a_list_of_texts_gives_a_list_for_each(model):
    texts = ["ab", "ef"]
    found = mmdlm.draw(model, texts, n=2, seed=[1, 8], steps=3, details=True)
    for text, seed, many in zip(texts, (1, 8), found, strict=True):
        alone = [mmdlm.draw(model, text, seed=seed + i, steps=3, details=True) for i in range(2)]
        assert [one.codes.tolist() for one in many] == [one.codes.tolist() for one in alone]
    single = mmdlm.draw(model, "ab", n=1, seed=1, steps=3)
    assert len(single) == 1
    assert np.array_equal(single[0], mmdlm.draw(model, "ab", seed=1, steps=3))


def test_the_best_of_many_is_the_image_of_its_seed(model):
    given = {"seed": 5, "steps": 6}
    images = mmdlm.draw(model, "ef", n=12, **given)
    best = mmdlm.draw(model, "ef", best_of=12, score=brightness, n=3, details=True, **given)
    values = brightness([one.image for one in best], "ef")
    assert values == sorted(values, reverse=True)
    every = brightness(images, "ef")
    assert set(values) <= set(every)
    assert values[0] >= np.mean(every)
    again = mmdlm.draw(model, "ef", best_of=12, score=brightness, **given)
    assert brightness([again], "ef") == values[:1]


def test_scores_see_images_that_are_partly_grey(model):
    seen = []

    def score(images, text):
        seen.append((text, [np.asarray(image) for image in images]))
        return brightness(images, text)

    mmdlm.draw(model, "ef", best_of=8, score=score, seed=0, steps=6)
    (first, *_), (text, last) = [images for _, images in seen], seen[-1]
    assert text == "ef"
    assert [len(images) for _, images in seen] == sorted((len(i) for _, i in seen), reverse=True)
    assert any((image == 128).all(2).any() for image in first)
    assert not any((image == 128).all(2).any() for image in last)


def test_the_model_judges_its_own_images(model):
    given = {"seed": 5, "steps": 4}
    images = mmdlm.draw(model, "ef", n=4, **given)
    asked = QUESTION.format(text="ef")
    answers = mmdlm.answer(model, asked, image=images, choices=CHOICES, details=True)
    values = [each.probabilities["Yes"] for each in answers]
    best = mmdlm.draw(model, "ef", best_of=4, **given)
    assert np.array_equal(best, images[int(np.argmax(values))])


def test_images_branch(model):
    chosen = adjusted(model, "draw", steps=8)
    wanted = Wanted("ef", torch.full(model.drawing.grid(None), OPEN), None, 2)
    found = search(model, wanted, chosen, 8, 4, brightness, Branch(1, tokens=3))
    plain = search(model, wanted, chosen, 8, 4, brightness)
    assert len(found) == len(plain) == 4
    assert all(int(one.codes.min()) >= 0 for one in found)
    assert any(not one.codes.equal(other.codes) for one, other in zip(found, plain, strict=True))
    assert {one.forwards for one in found} == {16}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"n": 0}, "n is 0, expected at least 1"),
        ({"best_of": 0}, "best_of is 0, expected at least 1"),
        ({"n": 3, "best_of": 2}, "expected best_of to be at least n"),
        ({"score": brightness}, "score= is for best_of="),
    ],
)
def test_numbers_that_do_not_fit_are_refused(model, given, error):
    with pytest.raises(ValueError, match=error):
        mmdlm.draw(model, "ab", **given)
