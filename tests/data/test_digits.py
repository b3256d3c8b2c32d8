import builtins

import numpy as np
import pytest

pytest.importorskip("sklearn", reason='needs scikit-learn: pip install "mmdlm[data]"')

from sklearn.datasets import load_digits

from mmdlm.data.digits import WORDS, Digits

# Published scores refer to this split.
FIRST_LABELS = [5, 9, 2, 4, 6, 7, 9, 3, 4, 6, 8, 5]


def image_of(digits, index, seed=0):
    return digits.sample(index, np.random.default_rng(seed)).media("image")[0]


@pytest.fixture(scope="module")
def train() -> Digits:
    return Digits("train")


@pytest.fixture(scope="module")
def held_out() -> Digits:
    return Digits("held_out")


def test_splits_are_disjoint_and_complete(train, held_out):
    parts = [[scan.tobytes() for scan in part.scans] for part in (train, held_out)]
    everything = [scan.tobytes() for scan in np.round(load_digits().images * 255 / 16).astype("u1")]
    assert sorted(parts[0] + parts[1]) == sorted(everything)
    assert len(train) + len(held_out) == 1797
    assert not set(parts[0]) & set(parts[1])


def test_held_out_share_is_equal_for_every_digit(train, held_out):
    for digit in range(10):
        out, kept = (int((part.labels == digit).sum()) for part in (held_out, train))
        assert abs(out / (out + kept) - 0.2) < 0.01


def test_split_is_stable_and_follows_the_seed(held_out):
    again, other = Digits("held_out", seed=0), Digits("held_out", seed=1)
    assert np.array_equal(again.scans, held_out.scans)
    assert not np.array_equal(other.scans, held_out.scans)
    assert held_out.labels[:12].tolist() == FIRST_LABELS


def test_turns_name_the_label(train, held_out):
    for part in (train, held_out):
        for index in range(0, len(part), 37):
            sample = part.sample(index, np.random.default_rng(0))
            word = WORDS[part.labels[index]]
            question, caption = sample.turns
            assert (question.prompt, question.answer) == ("which digit is this ?", word)
            assert caption.prompt == "describe the picture"
            assert caption.answer == f"the handwritten digit {word}"
            assert (question.length, caption.length) == (4, 20)
            assert sample.group == "digit"


@pytest.mark.parametrize("size", [64, 48, 128])
def test_images_are_light_ink_on_a_dark_background(size):
    for split in ("train", "held_out"):
        part = Digits(split, size=size)
        for index in range(0, len(part), 101):
            image = image_of(part, index, index)
            assert image.shape == (size, size, 3)
            assert image.dtype == np.uint8
            assert image.max() > 120
            assert np.median(image[:2]) < 70 or np.median(image[-2:]) < 70


def test_enlarged_scans_keep_their_orientation(held_out):
    # Averaged back to 8 x 8, a held-out image is its scan: neither mirrored nor rotated.
    for index in range(0, len(held_out), 29):
        image = image_of(held_out, index)[..., 0].astype(float)
        small = image[8:56, 8:56].reshape(8, 6, 8, 6).mean(axis=(1, 3))
        likeness = np.corrcoef(small.ravel(), held_out.scans[index].ravel())[0, 1]
        assert likeness > 0.97


def test_training_images_depend_only_on_the_generator(train):
    first, again, other = (image_of(train, 3, s) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_held_out_images_are_deterministic(held_out):
    first, other = (image_of(held_out, 3, s) for s in (1, 2))
    assert np.array_equal(first, other)


def test_augmentation_keeps_the_ink_inside(train):
    rng = np.random.default_rng(0)
    for index in range(200):
        image = train.sample(index, rng).media("image")[0].max(axis=-1).astype(float)
        ink = np.clip(image - 60, 0, None)
        rim = ink.sum() - ink[2:-2, 2:-2].sum()
        assert rim < 0.12 * ink.sum()


def test_vocabulary_of_digits_is_exact(train):
    words = set()
    for index in range(len(train)):
        for digit_turn in train.sample(index, np.random.default_rng(0)).turns:
            words |= {*digit_turn.prompt.split(), *digit_turn.answer.split()}
            assert len(digit_turn.answer.split()) < digit_turn.length
    assert sorted(words) == train.vocabulary()


@pytest.mark.parametrize(
    ("options", "name"),
    [({"split": "test"}, "split"), ({"size": 8}, "size"), ({"seed": -1}, "seed")],
)
def test_error_names_the_invalid_option(options, name):
    with pytest.raises(ValueError, match=name):
        Digits(**options)


def test_index_out_of_range_is_rejected(train):
    for index in (-1, len(train)):
        with pytest.raises(IndexError, match=f"index {index}"):
            train.sample(index, np.random.default_rng(0))


def test_error_for_a_missing_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"mmdlm\[data\]"):
        Digits()
