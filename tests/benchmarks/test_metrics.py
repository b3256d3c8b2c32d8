"""Metrics: worked examples, and equality with the libraries' own corpus values."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from mmdlm.benchmarks import metrics
from mmdlm.benchmarks.bootstrap import interval, resampled
from mmdlm.benchmarks.metrics import METRICS, caption_tokens, vqa_normal

ANSWERS = ["A cat on a mat.", "a red dog", "nothing", "a large blue bird sings"]
TARGETS = [
    ["A cat on the mat.", "The cat sits on a mat."],
    ["a red dog"],
    ["a blue bird", "a bird", "one bird"],
    ["a large blue bird is singing"],
]


def value(name, answers, targets):
    scored = METRICS[name](answers, targets)
    return scored.value(scored.sums.sum(0))


@pytest.mark.parametrize(
    ("name", "answer", "accepted", "score"),
    [
        ("exact", "two  dogs ", ["two dogs"], 1),
        ("exact", "a cross, a star", ["a cross , a star"], 1),
        ("exact", "Two dogs", ["two dogs"], 0),
        ("exact", "b", ["a", "b"], 1),
        ("f1", "The big dog.", ["a dog"], 2 / 3),
        ("f1", "dog dog", ["dog"], 2 / 3),
        ("f1", "the", ["a"], 1),
        ("f1", "cat", ["dog", "a cat"], 1),
        ("anls", "Spokane", ["spokane"], 1),
        ("anls", "abcde", ["abcdx"], 0.8),
        ("anls", "ab", ["ax"], 0),  # a distance of 0.5 is not below the threshold
        ("anls", "abc", ["abx", "zzz"], 2 / 3),
        ("wer", "The cat, sat", ["the cat sat down"], 1 / 4),
        ("wer", "a b c d", ["a"], 3),
        ("wer", "a b", ["a c", "b"], 1 / 2),
        ("cer", "abd", ["abc"], 1 / 3),
        ("wer", "", [""], 0),
    ],
)
def test_worked_examples(name, answer, accepted, score):
    assert value(name, [answer], [accepted]) == pytest.approx(score)
    assert METRICS[name]([answer], [accepted]).each[0] == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "people", "score"),
    [
        ("yes", ["yes"] * 10, 1.0),
        ("Yes", ["yes"] * 10, 0.0),  # texts of unanimous people are not normalised
        ("yes", ["yes"] * 9 + ["no"], 1.0),
        ("no", ["yes"] * 9 + ["no"], 0.3),  # nine times 1/3, once 0
        ("no", ["yes"] * 8 + ["no"] * 2, 0.6),  # eight times 2/3, twice 1/3
        ("no", ["yes"] * 7 + ["no"] * 3, 0.9),  # seven times 1, three times 2/3
        ("no", ["yes"] * 6 + ["no"] * 4, 1.0),
        ("Two dogs.", ["2 dogs"] * 5 + ["dogs"] * 5, 1.0),
        ("the dont", ["don't"] * 4 + ["do"] * 6, 1.0),
    ],
)
def test_vqa_accuracy_leaves_each_person_out(answer, people, score):
    assert value("vqa", [answer], [people]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A red, green and blue one.", "red green and blue 1"),
        ("2,000 m", "2000 m"),
        ("1.5", "1.5"),
        ("hes at the shop - wont buy", "he's at shop won't buy"),
        ("black/white", "black white"),
        ("couldnt've", "couldn't've"),
        ("None", "0"),
    ],
)
def test_vqa_answers_are_normalised_as_in_its_code(text, normal):
    assert vqa_normal(text) == normal


def test_vqa_needs_several_answers():
    with pytest.raises(ValueError, match="a question has 1 accepted answers .*exact or anls"):
        METRICS["vqa"](["a"], [["a"]])


def test_corpus_values_are_those_of_the_libraries():
    import jiwer
    from pycocoevalcap.cider.cider import Cider
    from sacrebleu.metrics import BLEU, CHRF

    most = max(map(len, TARGETS))
    columns = [[t[i] if i < len(t) else None for t in TARGETS] for i in range(most)]
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        want = metric.corpus_score(ANSWERS, columns).score / 100
        assert value(name, ANSWERS, TARGETS) == pytest.approx(want, rel=1e-9)
    one = [[accepted[0]] for accepted in TARGETS]
    plain = [accepted[0].lower().rstrip(".") for accepted in TARGETS]
    want = jiwer.wer(plain, [answer.lower().rstrip(".") for answer in ANSWERS])
    assert value("wer", ANSWERS, one) == pytest.approx(want)
    found = {i: [caption_tokens(a)] for i, a in enumerate(ANSWERS)}
    truth = {i: [caption_tokens(t) for t in ts] for i, ts in enumerate(TARGETS)}
    assert value("cider", ANSWERS, TARGETS) == pytest.approx(Cider().compute_score(truth, found)[0])


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"vqa"}))
def test_right_answers_have_the_best_score(name):
    right = [accepted[0] for accepted in TARGETS]
    wrong = ["zzz"] * len(right)
    best, worst = value(name, right, TARGETS), value(name, wrong, TARGETS)
    assert best == {"wer": 0, "cer": 0, "cider": pytest.approx(best)}.get(name, pytest.approx(1))
    assert (best < worst) is (name in metrics.ERRORS)
    assert worst == pytest.approx(0, abs=0.05) or name in metrics.ERRORS


def test_captions_are_tokenized_as_by_stanford():
    text = "Don't touch the well-known cat\u2019s \u201ctoy\u201d \u2014 it's 3.5 m, OK? "
    text += "(\u5317\u4eac)"
    assert (
        caption_tokens(text)
        == "do n't touch the well-known cat 's toy it 's 3.5 m ok \u5317 \u4eac"
    )


@pytest.mark.parametrize(
    ("name", "module"), [("wer", "jiwer"), ("bleu", "sacrebleu"), ("cider", "pycocoevalcap")]
)
def test_a_missing_extra_is_named(name, module, monkeypatch):
    for known in [m for m in sys.modules if m.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{name} needs the extra: pip install "mmdlm\[eval\]"'):
        METRICS[name](["a"], [["a"]])


def mean(total):
    return total[0] / total[1]


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for seed in range(200):
        scores = (rng.random(60) < 0.7).astype(float)
        sums = np.stack([scores, np.ones(60)], 1)
        low, high = interval(resampled(sums, mean, np.arange(60), 200, seed))
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_answers_of_one_row_are_drawn_together():
    scores = np.repeat((np.arange(20) % 2).astype(float), 5)
    sums = np.stack([scores, np.ones(100)], 1)
    together = resampled(sums, mean, np.repeat(np.arange(20), 5))
    apart = resampled(sums, mean, np.arange(100))
    assert together.std() == pytest.approx(np.sqrt(5) * apart.std(), rel=0.15)
