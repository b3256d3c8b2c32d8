"""Metrics of text answers, one function each; corpus values from sums over answers.

Every function takes the answers and, per answer, its accepted targets. Scores are shares (papers
print 100 times these); CIDEr may exceed 1, and so may error rates.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

Targets = Items[Items[str]]


@dataclass(frozen=True)
class Scored:
    """Scores of answers by one metric.

    Args:
        each: [n] float64, score of every answer.
        sums: [n S] float64, what `value` needs the sum of.
        value: the score of a set of answers from the sum [S] of their rows.
    """

    each: np.ndarray
    sums: np.ndarray
    value: Callable[[np.ndarray], float]


def exact(answers: Items[str], targets: Targets) -> Scored:
    """Share of answers that equal a target, see `same`."""
    return _mean(
        any(same(answer, target) for target in accepted)
        for answer, accepted in zip(answers, targets, strict=True)
    )


def same(one: str, other: str) -> bool:
    """Whether two texts are equal, apart from white space between words and punctuation.

    Tokenizers of words do not keep it: "red , blue" may come back as "red, blue".
    """
    return PIECE.findall(one) == PIECE.findall(other)


def f1(answers: Items[str], targets: Targets) -> Scored:
    """Harmonic mean of precision and recall of words, of the best target.

    Without case, punctuation and articles, as in SQuAD's evaluate-v1.1.py (arXiv 1606.05250).
    """
    return _mean(
        max(_overlap(_words(answer), _words(target)) for target in accepted)
        for answer, accepted in zip(answers, targets, strict=True)
    )


def anls(answers: Items[str], targets: Targets) -> Scored:
    """Average normalised Levenshtein similarity, of the best target; below 0.5 it counts as 0.

    Without case and outer white space. Source: ST-VQA, arXiv 1905.13648, equation 1.
    """
    distance = _library("rapidfuzz.distance", "anls").Levenshtein.normalized_distance

    def similarity(answer: str, target: str) -> float:
        one, other = (" ".join(text.lower().split()) for text in (answer, target))
        far = distance(one, other)
        return 1 - far if far < 0.5 else 0.0

    return _mean(
        max(similarity(answer, target) for target in accepted)
        for answer, accepted in zip(answers, targets, strict=True)
    )


def vqa(answers: Items[str], targets: Targets) -> Scored:
    """VQA accuracy: over each person left out, min(1, matches among the others / 3), averaged.

    Source: GT-Vision-Lab/VQA, vqaEval.py. As there, texts are normalised unless all people gave
    the same answer.

    Raises:
        ValueError: a question has fewer than 4 answers, so that none could score 1.
    """
    few = next((accepted for accepted in targets if len(accepted) < 4), None)
    if few is not None:
        raise ValueError(
            f"vqa: a question has {len(few)} accepted answers ({', '.join(map(repr, few))}), "
            "expected the ten of VQA (at least 4); use the metrics exact or anls"
        )
    return _mean(
        _agreement(answer, accepted) for answer, accepted in zip(answers, targets, strict=True)
    )


def wer(answers: Items[str], targets: Targets) -> Scored:
    """Word error rate: edits over words of the nearest target (jiwer).

    Texts are normalised by transformers' BasicTextNormalizer of Whisper: lower case, without
    punctuation, symbols and text in brackets.
    """
    return _errors(answers, targets, _library("jiwer", "wer").process_words)


def cer(answers: Items[str], targets: Targets) -> Scored:
    """Character error rate: edits over characters of the nearest target, normalised as in `wer`."""
    return _errors(answers, targets, _library("jiwer", "cer").process_characters)


def bleu(answers: Items[str], targets: Targets) -> Scored:
    """BLEU of the corpus (sacrebleu, tokenizer 13a, with case); per answer with effective order."""
    metrics = _library("sacrebleu.metrics", "bleu")
    return _sacrebleu(metrics.BLEU(), metrics.BLEU(effective_order=True), answers, targets)


def chrf(answers: Items[str], targets: Targets) -> Scored:
    """chrF2 of the corpus (sacrebleu)."""
    metric = _library("sacrebleu.metrics", "chrf").CHRF()
    return _sacrebleu(metric, metric, answers, targets)


def cider(answers: Items[str], targets: Targets) -> Scored:
    """CIDEr-D (pycocoevalcap), with document frequencies from all targets given.

    Texts are tokenized by `caption_tokens`. It compares images: with a single one it is 0.
    """
    scorer = _library("pycocoevalcap.cider.cider", "cider").Cider()
    return _coco(scorer, answers, targets)


def rouge(answers: Items[str], targets: Targets) -> Scored:
    """ROUGE-L (pycocoevalcap); texts are tokenized by `caption_tokens`."""
    scorer = _library("pycocoevalcap.rouge.rouge", "rouge").Rouge()
    return _coco(scorer, answers, targets)


METRICS: dict[str, Callable[[Items[str], Targets], Scored]] = {
    made.__name__: made for made in (exact, f1, cider, rouge, bleu, chrf, wer, cer, vqa, anls)
}
ERRORS = ("wer", "cer")
"""Metrics of which a lower value is better."""
OF_CORPUS = ("cider", "rouge", "bleu", "chrf")
"""Metrics in which a right answer need not have the best value."""
DEFAULTS = {
    "caption": ("cider", "bleu", "rouge", "exact"),
    "describe": ("cider", "bleu", "rouge", "exact"),
    "transcribe": ("wer", "cer", "exact"),
    "answer": ("exact", "f1"),
    "generate": ("exact", "f1", "chrf"),
}
"""Metrics by the task of the data."""

PIECE = re.compile(r"\w+|[^\w\s]")
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+(?:[-'.,][^\W_]+)*|[^\w\s]")
CLITIC = re.compile(r"(n't|'(?:s|m|d|ll|re|ve))$")
DROPPED = {*"'\"`.?!,:;-()[]{}\u2014\u2018\u201c\u201d", "--", "..."}


def caption_tokens(text: str) -> str:
    """Tokens of a caption, separated by spaces: an approximation of COCO's tokenizer in Python.

    COCO's is Stanford's PTBTokenizer, which needs Java. As there: lower case, clitics apart
    ("don't" is "do n't"), words with hyphens whole, punctuation left out. Chinese and Japanese
    characters are one token each.
    """
    tokens = []
    for word in WORD.findall(text.lower().replace("\u2019", "'")):
        tokens += CLITIC.sub(r" \1", word).split()
    return " ".join(token for token in tokens if token not in DROPPED)


def _mean(scores: Any) -> Scored:
    each = np.array([float(score) for score in scores])
    sums = np.stack([each, np.ones_like(each)], 1)
    return Scored(each, sums, lambda total: float(total[0] / total[1]))


def _words(text: str) -> list[str]:
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _overlap(one: list[str], other: list[str]) -> float:
    if not one or not other:
        return float(one == other)
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / (len(one) + len(other))


def _errors(answers: Items[str], targets: Targets, process: Callable[..., Any]) -> Scored:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    normal = BasicTextNormalizer()
    sums = []
    for answer, accepted in zip(answers, targets, strict=True):
        counts = []
        for target in accepted:
            found = process([normal(target).strip()], [normal(answer).strip()])
            edits = found.substitutions + found.deletions + found.insertions
            counts.append((edits, found.hits + found.substitutions + found.deletions))
        sums.append(min(counts, key=lambda one: one[0] / max(one[1], 1)))
    table = np.array(sums, float).reshape(-1, 2)
    each = table[:, 0] / table[:, 1].clip(min=1)
    return Scored(each, table, lambda total: float(total[0] / max(total[1], 1)))


def _sacrebleu(corpus: Any, sentence: Any, answers: Items[str], targets: Targets) -> Scored:
    """Scores of a metric of sacrebleu.

    sacrebleu's own bootstrap uses the same two methods of statistics; its public ones give no
    statistics per answer. A test compares the value with the public `corpus_score`.
    """
    most = max(map(len, targets))
    columns = [[t[i] if i < len(t) else None for t in targets] for i in range(most)]
    sums = np.array(corpus._extract_corpus_statistics(list(answers), columns), float)

    def value(total: np.ndarray) -> float:
        return corpus._compute_score_from_stats(total.astype(int).tolist()).score / 100

    pairs = zip(answers, targets, strict=True)
    each = [
        sentence.sentence_score(answer, list(accepted)).score / 100 for answer, accepted in pairs
    ]
    return Scored(np.array(each), sums, value)


def _coco(scorer: Any, answers: Items[str], targets: Targets) -> Scored:
    found = dict(enumerate([caption_tokens(answer)] for answer in answers))
    truth = dict(enumerate([caption_tokens(one) for one in accepted] for accepted in targets))
    _, each = scorer.compute_score(truth, found)
    return _mean(each)


# From here on: the normalisation of GT-Vision-Lab/VQA, vqaEval.py.
NUMBERS = dict(zero="0", one="1", two="2", three="3", four="4", five="5", six="6", seven="7")
NUMBERS |= dict(eight="8", nine="9", ten="10", none="0")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CORRECT = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in CORRECT.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""What lacks one apostrophe, to its correct form; the last is an error of the source."""


def vqa_normal(text: str) -> str:
    """An answer without case, articles and most punctuation, with digits for number words."""
    joined = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in PUNCTUATION:
        at_edge = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if at_edge or joined else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = (NUMBERS.get(word, word) for word in plain.lower().split())
    kept = (word for word in words if word not in ("a", "an", "the"))
    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def _agreement(answer: str, accepted: Items[str]) -> float:
    """VQA accuracy of one answer."""
    answer, *people = (re.sub(r"[\n\t]", " ", text).strip() for text in (answer, *accepted))
    if len(set(people)) > 1:
        answer, *people = map(vqa_normal, (answer, *people))
    same = [person == answer for person in people]
    return sum(min(1, (sum(same) - one) / 3) for one in same) / len(same)


def _library(module: str, metric: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f'the metric {metric} needs the extra: pip install "mmdlm[eval]" ({error})'
        ) from error
