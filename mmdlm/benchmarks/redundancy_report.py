"""Tables, plot and JSON of `mmdlm bench redundancy`."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from mmdlm.benchmarks.bootstrap import interval, resampled
from mmdlm.benchmarks.budgets import ALL, PRUNING, SKIPPING

LONG, SHORT = "long answers", "short answers"
LATER, EARLY = ("late", "progressive"), ("before the model", "in the first step")
CONTRASTS = {
    "late or progressive minus early pruning": (LATER, EARLY),
    "skipped layers minus pruning": (SKIPPING, PRUNING),
}
"""Ways whose means are compared, first minus second."""


@dataclass(frozen=True)
class Measured:
    """Answers of one model, reduced in one way.

    Args:
        model: its name.
        task: `LONG` or `SHORT`.
        budget: share of the image tokens that was to be computed.
        way: name, see `mmdlm.benchmarks.budgets`.
        spent: share that was computed.
        words: [1 + rounds] share of right words that depend on the image, and of its resamples.
        exact: the same of right answers.
    """

    model: str
    task: str
    budget: float
    way: str
    spent: float
    words: np.ndarray
    exact: np.ndarray


@dataclass(frozen=True)
class Recovered:
    """Share of the image's information that is left after pruning, by denoising step.

    Args:
        model: its name.
        budget: share of the image tokens that stay.
        right: [3 T] share of right words with all image tokens, with some, and without any.
        shares: [1 + rounds T] of what the image adds, what some of its tokens add; then resamples.
    """

    model: str
    budget: float
    right: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(
        cls, model: str, budget: float, right: np.ndarray, cases: np.ndarray, rows: np.ndarray
    ) -> Self:
        """From counts per answer.

        Args:
            model: see above.
            budget: see above.
            right: [3 T n] right words.
            cases: [T n] words.
            rows: [n] number of the image of each answer.
        """
        columns = []
        for step in range(right.shape[1]):
            sums = right[:, step].T  # [n 3]
            columns.append(np.append(_added(sums.sum(0)), resampled(sums, _added, rows)))
        total = right.sum(2) / cases.sum(1).clip(1)
        return cls(model, budget, total, np.stack(columns, 1))

    @property
    def gain(self) -> np.ndarray:
        """[1 + rounds] mean share of the last third of the steps minus that of the first."""
        third = max(1, self.shares.shape[1] // 3)
        return self.shares[:, -third:].mean(1) - self.shares[:, :third].mean(1)


def _added(sums: np.ndarray) -> float:
    """(some - none) / (all - none) of right words, 0 where the image adds nothing."""
    whole, some, none = sums
    return float((some - none) / (whole - none)) if whole > none else 0.0


def contrast(found: Items[Measured], model: str, task: str, budget: float, name: str) -> np.ndarray:
    """[1 + rounds] difference of the means of two groups of ways.

    Args:
        found: all results; equal resamples are compared.
        model: name.
        task: `LONG` or `SHORT`.
        budget: share.
        name: of `CONTRASTS`.
    """
    own = {
        one.way: one.words
        for one in found
        if (one.model, one.task, one.budget) == (model, task, budget)
    }
    first, second = (np.mean([own[way] for way in group], 0) for group in CONTRASTS[name])
    return first - second


def shown(values: np.ndarray) -> str:
    """The first value and the interval of the others, in per cent."""
    low, high = interval(values[1:])
    return f"{100 * values[0]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def tables(found: Items[Measured], recovered: Items[Recovered]) -> list[Any]:
    """One table per task, one of what steps recover, and one of the comparisons."""
    models = list(dict.fromkeys(one.model for one in found))
    budgets = list(dict.fromkeys(one.budget for one in recovered))
    made = []
    for task in dict.fromkeys(one.task for one in found):
        rows: dict[tuple[str, ...], list[str]] = {}
        for one in (each for each in found if each.task == task):
            key = (one.way, f"{one.spent:.0%}")
            rows.setdefault(key, []).append(shown(one.words))
        title = f"{task}: words right, % [95 % interval]"
        made.append(_table(title, ("image tokens", "computed", *models), rows))
    rows = {}
    for one in recovered:
        places = np.linspace(0, one.shares.shape[1] - 1, 4).round().astype(int)
        cells = [f"{100 * one.shares[0, i]:.0f}" for i in places]
        rows[one.model, f"{one.budget:.0%}"] = [*cells, shown(one.gain)]
        steps = [f"step {i + 1}" for i in places]
    title = "long answers: share of the image's information left after pruning, %"
    made.append(_table(title, ("model", "kept", *steps, "last minus first third"), rows))
    rows = {
        (name, task, f"{budget:.0%}"): [
            shown(contrast(found, model, task, budget, name)) for model in models
        ]
        for name in CONTRASTS
        for task in (LONG, SHORT)
        for budget in budgets
    }
    made.append(_table("differences in points", ("", "task", "budget", *models), rows))
    return made


def _table(title: str, head: Items[str], rows: dict[tuple[str, ...], list[str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for key, cells in rows.items():
        table.add_row(*key, *cells)
    return table


def as_json(found: Items[Measured], recovered: Items[Recovered]) -> dict[str, Any]:
    """All numbers as plain types; each share with its 95 % interval."""

    def value(values: np.ndarray) -> list[float]:
        return [float(values[0]), *interval(values[1:])]

    names = list(dict.fromkeys(one.model for one in found))
    return {
        "answers": [
            vars(one) | {"words": value(one.words), "exact": value(one.exact)} for one in found
        ],
        "recovered": [
            {
                "model": one.model,
                "budget": one.budget,
                "right": one.right.tolist(),
                "shares": [value(column) for column in one.shares.T],
                "gain": value(one.gain),
            }
            for one in recovered
        ],
        "differences": [
            {
                "what": name,
                "model": model,
                "task": task,
                "budget": budget,
                "words": value(contrast(found, model, task, budget, name)),
            }
            for name in CONTRASTS
            for model in names
            for task in (LONG, SHORT)
            for budget in dict.fromkeys(one.budget for one in recovered)
        ],
    }


def draw(found: Items[Measured], recovered: Items[Recovered], out: Path) -> None:
    """Plots the words of long answers by way, and what steps recover; one colour per model."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plot needs the extra: pip install "mmdlm[demo]"') from error
    budgets = list(dict.fromkeys(one.budget for one in recovered))
    models = list(dict.fromkeys(one.model for one in recovered))
    figure = Figure(figsize=(11, 3.2 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), 2, squeeze=False, width_ratios=(3, 2))
    names = [ALL.name, *PRUNING, *SKIPPING]
    for budget, (left, right) in zip(budgets, panels, strict=True):
        for i, model in enumerate(models):
            own = [o for o in found if (o.model, o.task) == (model, LONG)]
            own = [o for o in own if o.budget in (1.0, budget)]
            middle = [100 * o.words[0] for o in own]
            ends = np.array([interval(100 * o.words[1:]) for o in own]).T
            at = [names.index(o.way) + 0.2 * (i - 1) for o in own]
            error = np.abs(ends - middle)
            left.errorbar(at, middle, error, fmt="o", color=f"C{i}", label=model, markersize=4)
            line = next(o for o in recovered if (o.model, o.budget) == (model, budget))
            steps = np.arange(1, line.shares.shape[1] + 1)
            low, high = np.percentile(100 * line.shares[1:], [2.5, 97.5], axis=0)
            right.plot(steps, 100 * line.shares[0], color=f"C{i}", label=model)
            right.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        left.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
        left.set_ylabel("right words of long answers, %", fontsize=8)
        left.set_title(f"{budget:.0%} of the image tokens computed", fontsize=9, loc="left")
        right.set_title("information of the image left, %", fontsize=9, loc="left")
        right.set_xlabel("denoising step", fontsize=8)
        for panel in (left, right):
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
