"""Captions, questions and digits: the share of exact answers."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np

from mmdlm.benchmarks.answers import Answered, answer, hits, ways
from mmdlm.benchmarks.report import Score
from mmdlm.data.dataset import Dataset
from mmdlm.data.digits import Digits
from mmdlm.data.scenes import Scenes
from mmdlm.messages import Example
from mmdlm.model import MultimodalDLM
from mmdlm.simulators.rollout import wilson

SEED = 12345  # training draws Scenes(seed=0), validation seed=1
RELATIONS = ("left", "right", "above", "below")
# Prefix of a question to its kind; the first match counts.
KINDS = {
    "what colour": "colour",
    **{f"what shape is {word}": "neighbour" for word in RELATIONS},
    "what shape": "shape",
    "how large": "size",
    "how many": "count",
    "is there": "presence",
    "is the": "relation",
}


def caption_parts(count: int, seed: int = SEED) -> dict[str, list[Example]]:
    """Fresh images of one, two and three shapes, each with its caption.

    Args:
        count: images per part.
        seed: seed of the images; training uses 0 and 1.
    """
    sets = {
        f"scene{n}": Scenes(objects=(n,), seed=seed, count=count, questions=0) for n in (1, 2, 3)
    }
    return {name: drawn(scenes, count) for name, scenes in sets.items()}


def question_parts(count: int, seed: int = SEED) -> dict[str, list[Example]]:
    """Fresh images with questions, by the kind of question.

    Args:
        count: number of images, with five questions each.
        seed: seed of the images and questions.
    """
    scenes = Scenes(seed=seed, count=count, questions=5, caption=False)
    parts: dict[str, list[Example]] = {}
    for sample in drawn(scenes, count, seed):
        for turn, branch in zip(sample.turns, sample.branches, strict=True):
            parts.setdefault(kind_of(turn.prompt), []).append(replace(sample, branches=(branch,)))
    return dict(sorted(parts.items()))


def digit_parts(count: int | None = None) -> dict[str, list[Example]]:
    """Handwritten digits kept from training, with the question which one it is.

    Args:
        count: largest number of digits; None: all.
    """
    digits = Digits("held_out")
    samples = drawn(digits, min(count or len(digits), len(digits)))
    return {"held_out": [replace(sample, branches=sample.branches[:1]) for sample in samples]}


def drawn(dataset: Dataset, count: int, seed: int = SEED) -> list[Example]:
    """The first samples of a dataset; sample i depends only on the seed and i."""
    return [dataset.sample(i, np.random.default_rng((seed, i))) for i in range(count)]


def kind_of(question: str) -> str:
    """The kind of a question about a scene; "other" for unknown ones."""
    return next((kind for start, kind in KINDS.items() if question.startswith(start)), "other")


def exact(
    model: MultimodalDLM,
    what: str,
    task: str,
    parts: dict[str, list[Example]],
    decodings: str,
    name: str = "",
    batch: int = 32,
) -> list[Score]:
    """The share of exact answers, for every part and decoding.

    Args:
        model: the model.
        what: name of the benchmark.
        task: key of the checkpoint's presets.
        parts: samples by the name of their part.
        decodings: see `mmdlm.benchmarks.answers.ways`.
        name: name of the checkpoint in the report.
        batch: answers decoded together.
    """
    metric = "exact" if what == "captions" else "accuracy"
    scores = []
    for way, strategies in ways(model, task, decodings).items():
        whole: list[Score] = []
        for part, samples in parts.items():
            found = answer(model, samples, strategies, batch)
            right = sum(hits(model, samples, found))
            whole.append(score(what, part, name, way, metric, right, found, batch))
        scores += whole if len(whole) == 1 else [*whole, together(whole)]
    return scores


def score(
    what: str,
    part: str,
    name: str,
    way: str,
    metric: str,
    right: int,
    found: Answered,
    batch: int,
) -> Score:
    """A share of correct answers with its interval and cost."""
    count = len(found.texts)
    low, high = wilson(right, count)
    forwards = float(np.mean(found.forwards))
    ms = 1e3 * found.seconds / count
    return Score(
        what, part, name, way, metric, right / count, count, low, high, forwards, ms, batch
    )


def together(parts: Items[Score]) -> Score:
    """Combines the parts of one benchmark into one score."""
    count = sum(part.count for part in parts)
    right = round(sum(part.value * part.count for part in parts))
    low, high = wilson(right, count)

    def mean(name: str) -> float:
        return sum(getattr(part, name) * part.count for part in parts) / count

    return replace(
        parts[0],
        part="all",
        value=right / count,
        count=count,
        low=low,
        high=high,
        forwards=mean("forwards"),
        ms=mean("ms"),
    )
