"""Scores of a model on a user's data: metrics with intervals, by group, and against another."""

from __future__ import annotations

import warnings
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.table import Table

from mmdlm.benchmarks.bootstrap import interval, resampled
from mmdlm.benchmarks.metrics import DEFAULTS, ERRORS, METRICS, OF_CORPUS, Scored
from mmdlm.benchmarks.questions import Asked, Reply, questions, replies, task_of
from mmdlm.benchmarks.report import Comparison, Score
from mmdlm.data.dataset import Dataset
from mmdlm.decoding.preset import Choice
from mmdlm.model import MultimodalDLM
from mmdlm.tasks import chat
from mmdlm.tasks.generate import LENGTH, Settings, resolve_settings

WHOLE = "all"
VOTES = 4  # accepted answers per question, from which VQA accuracy has a meaning


@dataclass(frozen=True)
class Evaluation:
    """Replies of a model to the questions of a data set, and their scores.

    Args:
        name: name of the data.
        model: name of the model.
        decoding: name of the decoding.
        asked: questions.
        replies: one per question; those with an error are not scored.
        metrics: names of metrics, the first is the most important one.
        batch: questions per batch.
        failed: rows and questions without a reply.
    """

    name: str
    model: str
    decoding: str
    asked: Items[Asked]
    replies: Items[Reply]
    metrics: tuple[str, ...]
    batch: int = 16
    failed: int = 0

    @cached_property
    def answered(self) -> np.ndarray:
        """Indices of the questions that have a reply."""
        return np.array([i for i, reply in enumerate(self.replies) if not reply.error], int)

    @cached_property
    def scored(self) -> dict[str, Scored]:
        """Scores of the answered questions by metric.

        Raises:
            ImportError: a metric needs the extra `eval`.
            ValueError: nothing was answered, or a metric does not suit the targets.
        """
        if not len(self.answered):
            raise ValueError(f"no question of {self.name} was answered: {self.replies[0].error}")
        answers = [self.replies[i].text for i in self.answered]
        targets = [self.asked[i].targets for i in self.answered]
        return {name: METRICS[name](answers, targets) for name in self.metrics}

    @cached_property
    def parts(self) -> dict[str, np.ndarray]:
        """By group, positions among the answered questions; the first group is all of them."""
        groups = np.array([self.asked[i].group for i in self.answered])
        parts = {WHOLE: np.arange(len(groups))}
        names = sorted(set(groups.tolist()) - {""})
        if len(names) > 1 or (names and "" in groups):
            parts |= {name: np.flatnonzero(groups == name) for name in names}
        return parts

    @property
    def rows(self) -> np.ndarray:
        """Row of each answered question."""
        return np.array([self.asked[i].row for i in self.answered])

    def resampled(self, metric: str, inside: np.ndarray) -> np.ndarray:
        """Values of a metric on resamples of some of the answered questions."""
        scored = self.scored[metric]
        return resampled(scored.sums[inside], scored.value, self.rows[inside])

    def value(self, metric: str, inside: np.ndarray) -> float:
        """A metric on some of the answered questions."""
        scored = self.scored[metric]
        return scored.value(scored.sums[inside].sum(0))

    def scores(self) -> list[Score]:
        """Every metric of every group, with 95 % bootstrap intervals over rows."""
        forwards = np.array([self.replies[i].forwards for i in self.answered])
        found = []
        for part, inside in self.parts.items():
            for metric in self.metrics:
                several = len(set(self.rows[inside])) > 1
                low, high = interval(self.resampled(metric, inside)) if several else (None, None)
                found.append(
                    Score(
                        *(self.name, part, self.model, self.decoding, metric),
                        self.value(metric, inside),
                        *(len(inside), low, high, float(forwards[inside].mean())),
                        batch=self.batch,
                    )
                )
        return found

    def best(self) -> np.ndarray:
        """[n] bool, whether each answered question is answered as well as it can be."""
        if self.metrics[0] not in OF_CORPUS:
            each = self.scored[self.metrics[0]].each
            return each <= 0 if self.metrics[0] in ERRORS else each >= 1
        answers = [self.replies[i].text for i in self.answered]
        targets = [self.asked[i].targets for i in self.answered]
        return METRICS["exact"](answers, targets).each >= 1

    def gains(self, metric: str) -> np.ndarray:
        """[n] score of each answered question, higher is better."""
        each = self.scored[metric].each
        return -each if metric in ERRORS else each


def evaluate(
    model: MultimodalDLM,
    dataset: Dataset,
    metrics: Items[str] | None = None,
    *,
    name: str = "data",
    rows: int | None = None,
    length: int | None = None,
    strategies: Choice = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Evaluation:
    """Scores of a model on a data set.

    Args:
        model: model.
        dataset: such as one of `mmdlm.benchmarks.questions.open_sets(path)`.
        metrics: names, see `mmdlm.benchmarks.metrics`; None: by the kind of the data.
        name: name of the data in the report.
        rows: number of rows, drawn at random; None: all.
        length: canvas in tokens; None: see `settings`.
        strategies: see `mmdlm.answer`.
        batch_size: questions per batch.
        seed: of the rows, and of decodings that draw random numbers.
    Raises:
        ValueError: an answer is not a text, or a metric is unknown.
    """
    check(metrics or ())
    dataset.connect(model.processor, model.preset)
    asked, unread = questions(dataset, rows, seed)
    task = task_of(dataset, asked)
    how = settings(model, task, asked, length, strategies)
    chosen = choose_metrics(metrics or (), task, asked)
    found = replies(model, asked, how, batch_size, seed)
    lost = len(unread) + sum(bool(reply.error) for reply in found)
    way = (
        strategies if isinstance(strategies, str) else "default" if strategies is None else "given"
    )
    family = model.system or model.spec.family
    return Evaluation(name, family, way, asked, found, chosen, batch_size, lost)


def check(metrics: Items[str]) -> None:
    """Raises a ValueError for an unknown or repeated metric."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or len(set(metrics)) < len(metrics):
        raise ValueError(
            f"metrics is {','.join(metrics)}, expected different ones of {', '.join(METRICS)}"
        )


def choose_metrics(given: Items[str], task: str, asked: Items[Asked]) -> tuple[str, ...]:
    """The metrics given, else those of a task, tried on one question before any is answered.

    Args:
        given: names; may be empty.
        task: see `mmdlm.benchmarks.questions.task_of`. VQA accuracy comes first where every
            question has several answers.
        asked: questions.

    Raises:
        ImportError: a metric needs the extra `eval`.
        ValueError: a metric does not suit the targets.
    """
    fewest = min((one.targets for one in asked), key=len)
    votes = task == "answer" and len(fewest) >= VOTES
    chosen = tuple(given) or (("vqa", *DEFAULTS[task]) if votes else DEFAULTS[task])
    for name in chosen:
        METRICS[name](["x"], [fewest])
    return chosen


def settings(
    model: MultimodalDLM,
    task: str,
    asked: Items[Asked],
    length: int | None,
    strategies: Choice,
) -> Settings:
    """Canvas length and strategies of a task, see `mmdlm.tasks.generate.resolve_settings`.

    Args:
        model: model.
        task: see `mmdlm.benchmarks.questions.task_of`.
        asked: questions, whose longest target is the least that the canvas must hold.
        length: canvas in tokens; None: the checkpoint's default, or more if a target is longer.
        strategies: see `mmdlm.answer`.
    """
    if length is None:
        entry = model.preset.get(task) or {}
        default = entry.get("length") or (chat.LENGTH if task == "generate" else LENGTH)
        length = max(default, 1 + max(_tokens(model, t) for one in asked for t in one.targets))
    return resolve_settings(model, task, None, length, strategies, needs_prompt=False)


def _tokens(model: MultimodalDLM, text: str) -> int:
    """Number of tokens of a text; 0 if the model cannot write it."""
    try:
        return len(model.processor.encode(text))
    except ValueError:
        return 0


def compare(one: Evaluation, other: Evaluation) -> list[Comparison]:
    """Every metric of every group of two evaluations of the same questions.

    Both are scored on the questions that both answered. Differences are those of the same
    resamples of rows.

    Args:
        one: the first.
        other: the second; its questions and metrics are those of the first.
    """
    one, other = _shared(one, other)
    found = []
    for part, inside in one.parts.items():
        for metric in one.metrics:
            values = [each.value(metric, inside) for each in (one, other)]
            low, high = interval(one.resampled(metric, inside) - other.resampled(metric, inside))
            gain = (one.gains(metric) - other.gains(metric))[inside]
            found.append(
                Comparison(
                    *(one.name, part, title(one, other), title(other, one), metric, *values),
                    *(values[0] - values[1], low, high),
                    *(int(n) for n in ((gain > 0).sum(), (gain < 0).sum(), (gain == 0).sum())),
                )
            )
    return found


def title(one: Evaluation, other: Evaluation) -> str:
    """What tells an evaluation from another: its model or its decoding."""
    return one.model if one.model != other.model else one.decoding


def _shared(*all_: Evaluation) -> list[Evaluation]:
    """Evaluations of the questions that all of them answered."""
    kept = sorted(set.intersection(*(set(each.answered.tolist()) for each in all_)))
    return [
        Evaluation(
            *(each.name, each.model, each.decoding),
            [each.asked[i] for i in kept],
            [each.replies[i] for i in kept],
            each.metrics,
            each.batch,
        )
        for each in all_
    ]


@dataclass(frozen=True)
class Failure:
    """A question that a model did not answer as well as possible.

    Args:
        asked: the question.
        replies: reply of each model.
        scores: of each model, the score by metric.
    """

    asked: Asked
    replies: tuple[Reply, ...]
    scores: tuple[dict[str, float], ...]

    def to_dict(self, names: Items[str]) -> dict[str, Any]:
        """Plain types; the second model under "against".

        Args:
            names: of the models.
        """
        asked = self.asked
        made = {"place": asked.place, "group": asked.group, "file": asked.file}
        made |= {"question": asked.question, "targets": list(asked.targets)}
        keys = zip(("", "against_"), names, self.replies, self.scores, strict=False)
        for prefix, name, reply, scores in keys:
            made |= {f"{prefix}model": name, f"{prefix}answer": reply.text}
            made |= {f"{prefix}scores": scores}
        return made


def failures(one: Evaluation, other: Evaluation | None = None) -> list[Failure]:
    """Questions whose answer is not the best possible, the worst first.

    Args:
        one: evaluation of the model.
        other: of another model; those the models differ most in come first then, with those that
            only the other one got wrong.
    """
    all_ = _shared(one, *([] if other is None else [other]))
    metric = one.metrics[0]
    wrong = ~np.logical_and.reduce([each.best() for each in all_])
    gains = np.stack([each.gains(metric) for each in all_])
    order = gains[0] if other is None else -np.abs(gains[0] - gains[1])
    places = [i for i in np.argsort(order, kind="stable").tolist() if wrong[i]]
    return [
        Failure(
            all_[0].asked[i],
            tuple(each.replies[i] for each in all_),
            tuple(
                {name: round(float(s.each[i]), 4) for name, s in each.scored.items()}
                for each in all_
            ),
        )
        for i in places
    ]


def warn_of_truncation(one: Evaluation, length: int) -> None:
    """Warns if answers filled their canvas."""
    full = sum(reply.truncated for reply in one.replies)
    if full:
        warnings.warn(
            f"{full} of {len(one.replies)} answers of {one.model} filled the canvas of {length} "
            "tokens without an end token; pass a larger --length if words are missing",
            stacklevel=2,
        )


def table(scores: Items[Score]) -> Table:
    """One row per group, one column per metric: 100 times the score, and below it the interval."""
    first = scores[0]
    metrics = list(dict.fromkeys(score.metric for score in scores))
    shown = Table(title=f"{first.what}: {first.model}, {first.decoding}", title_justify="left")
    shown.add_column("group")
    for name in ("answers", *metrics, "forwards"):
        shown.add_column(name, justify="right")
    for part in dict.fromkeys(score.part for score in scores):
        inside = [score for score in scores if score.part == part]
        cells = [
            f"{100 * s.value:.1f}"
            + ("" if s.low is None else f"\n{100 * s.low:.1f}-{100 * s.high:.1f}")
            for s in inside
        ]
        shown.add_row(part, str(inside[0].count), *cells, f"{inside[0].forwards:.1f}")
    return shown


def versus(comparisons: Items[Comparison]) -> Table:
    """One row per group and metric: both scores, their difference, wins and losses."""
    first = comparisons[0]
    shown = Table(
        title=f"{first.what}: {first.model} against {first.against}", title_justify="left"
    )
    shown.add_column("group")
    shown.add_column("metric")
    for name in (first.model, first.against, "difference", "better", "worse", "same"):
        shown.add_column(name, justify="right")
    for c in comparisons:
        spread = f"{100 * c.difference:+.1f} ({100 * c.low:+.1f} to {100 * c.high:+.1f})"
        counts = (str(n) for n in (c.wins, c.losses, c.ties))
        shown.add_row(
            *(c.part, c.metric, f"{100 * c.value:.1f}", f"{100 * c.other:.1f}", spread, *counts)
        )
    return shown
