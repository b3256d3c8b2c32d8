"""`mmdlm bench presets`: accuracy over forwards of every decoding preset, as table and plot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from mmdlm.benchmarks import captions, report, speech, success
from mmdlm.benchmarks.answers import PLAIN
from mmdlm.benchmarks.report import Score
from mmdlm.benchmarks.scores import absent
from mmdlm.checkpoint import load
from mmdlm.decoding import preset
from mmdlm.model import MultimodalDLM
from mmdlm.simulators.rollout import TRAINED

TASKS = ("captions", "speech", "act")
OURS = ("exact", "fast", "turbo")
"""Presets that are not published methods; the plot highlights them."""
METRIC = {"captions": "exact", "speech": "exact", "act": "success"}
NAMED = {"captions": "exact captions", "speech": "exact phrases", "act": "success"}


def tradeoff(
    model: MultimodalDLM,
    presets: Items[str],
    tasks: Items[str] = TASKS,
    count: int = 100,
    episodes: int = 2,
    name: str = "",
    data: Path | None = None,
    sim: str = TRAINED,
) -> tuple[list[Score], dict[tuple[str, str], str]]:
    """One score per task and preset, all on the same inputs.

    Args:
        model: the model.
        presets: names; "plain" is one token per step.
        tasks: of `TASKS`.
        count: images of each number of shapes, and clips of new phrases.
        episodes: per simulated task.
        name: name of the checkpoint in the report.
        data: spoken clips, see `mmdlm.benchmarks.speech.speech_parts`.
        sim: simulated tasks, see `mmdlm.simulators.rollout.simulators`.
    Returns:
        scores, and by (task, preset) the error of presets that do not support the model or task.
    """
    measure: dict[str, Callable[[str], list[Score]]] = {}
    if "captions" in tasks:
        images = captions.caption_parts(count)
        measure["captions"] = lambda way: captions.exact(
            model, "captions", "caption", images, way, name
        )
    if "speech" in tasks:
        clips = {"held_out": speech.speech_parts(count, data)["held_out"]}
        measure["speech"] = lambda way: speech.words_wrong(model, clips, way, name)
    if "act" in tasks:
        measure["act"] = lambda way: success.success(model, way, episodes, name=name, sim=sim)
    jobs = [(task, way) for way in presets for task in measure]
    scores: list[Score] = []
    rejected: dict[tuple[str, str], str] = {}
    for task, way in track(jobs, description="presets", transient=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a preset without effect shows in its forwards
                found = measure[task](way)
        except ValueError as error:
            rejected[task, way] = str(error)
            continue
        scores.append([score for score in found if score.metric == METRIC[task]][-1])
    return scores, rejected


def draw(scores: Items[Score], out: Path) -> Path:
    """Plots accuracy over forwards, one panel per task and one dot per preset; returns the path.

    Args:
        scores: result of `tradeoff`.
        out: file to write, .png or .svg.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plot needs the extra: pip install "mmdlm[demo]"') from error
    tasks = list(dict.fromkeys(score.what for score in scores))
    figure = Figure(figsize=(4.6 * len(tasks), 4.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        dots = [score for score in scores if score.what == task]
        low = _floor([100 * score.value for score in dots])
        for ours, colour in ((False, "#5b8db8"), (True, "#d9603b")):
            some = [s for s in dots if (s.decoding in OURS) == ours and 100 * s.value >= low]
            x, y = [s.forwards for s in some], [100 * s.value for s in some]
            panel.scatter(x, y, s=26, color=colour, alpha=0.85, zorder=3)
        for score in dots:
            if 100 * score.value < low:  # far below the others: an arrow with the number
                label = f"{score.decoding} {100 * score.value:.0f}"
                panel.scatter([score.forwards], [low], marker="v", s=26, color="#9aa5ad")
                at = (score.forwards, low)
                panel.annotate(
                    label, at, (0, 5), textcoords="offset points", fontsize=7, ha="center"
                )
        for (x, y), label in _labels([s for s in dots if 100 * s.value >= low]):
            end = x > 8
            panel.annotate(
                *(label, (x, y), (-5 if end else 5, -5)),
                textcoords="offset points",
                fontsize=7,
                ha="right" if end else "left",
                va="top",
            )
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel("forwards per answer" if task != "act" else "forwards per query")
        panel.set_title(f"{NAMED[task]}, %", fontsize=10, loc="left")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    return out


def _floor(values: Items[float]) -> float:
    """Lower limit of the axis; a few values far below it are drawn as arrows."""
    low = max(values) - 12
    below = sum(value < low for value in values)
    return low if below <= len(values) // 8 else min(values)


def _labels(scores: Items[Score]) -> list[tuple[tuple[float, float], str]]:
    """Labels of our presets and the Pareto-optimal ones, one per position."""
    named: list[Score] = []
    for score in sorted(scores, key=lambda s: (s.forwards, -s.value)):
        better = [s for s in named if s.value >= score.value and s.decoding not in OURS]
        if score.decoding in OURS or not better:
            named.append(score)
    places: dict[tuple[int, int], list[Score]] = {}
    for score in named:
        place = (round(2 * np.log2(score.forwards)), round(50 * score.value))
        places.setdefault(place, []).append(score)
    return [
        ((s[0].forwards, 100 * s[0].value), "\n".join(each.decoding for each in s))
        for s in places.values()
    ]


def table(scores: Items[Score], rejected: dict[tuple[str, str], str]) -> Any:
    """A table of accuracy and forwards, one row per preset."""
    from rich.table import Table

    tasks = list(dict.fromkeys([*(s.what for s in scores), *(task for task, _ in rejected)]))
    shown = Table(title="Accuracy and forwards by decoding preset", title_justify="left")
    shown.add_column("preset")
    for task in tasks:
        shown.add_column(NAMED[task], justify="right")
        shown.add_column("forwards", justify="right")
    by_place = {(score.what, score.decoding): score for score in scores}
    ways = dict.fromkeys([*(s.decoding for s in scores), *(way for _, way in rejected)])

    def cost(way: str) -> float:
        return float(np.mean([s.forwards for s in scores if s.decoding == way] or [np.inf]))

    for way in sorted(ways, key=cost):
        cells: list[str] = []
        for task in tasks:
            score = by_place.get((task, way))
            cells += (
                ["-", "-"]
                if score is None
                else [f"{100 * score.value:.1f}"] + [f"{score.forwards:.1f}"]
            )
        shown.add_row(way, *cells)
    return shown


def bench_presets(
    presets: list[str] = (),
    model: str = "tiny",
    tasks: list[str] = TASKS,
    count: int = 100,
    episodes: int = 2,
    data: Path | None = None,
    sim: str = TRAINED,
    out: Path | None = None,
    plot: Path | None = None,
    device: str = "cpu",
) -> int:
    """Measure every decoding preset on captions, speech and robot tasks.

    mmdlm bench presets --plot presets.png --out presets.jsonl
    mmdlm bench presets fast,turbo,plain --tasks captions --count 500

    A dash in the table means that the preset does not support the model or task; the errors follow.

    Args:
        presets: names, see mmdlm list decoding; by default all, and plain: one token per step.
        model: bundled name, folder or hub id.
        tasks: of captions, speech, act.
        count: images of each number of shapes, and spoken phrases.
        episodes: per simulated task.
        data: folder with spoken clips; by default new ones are synthesised.
        sim: simulated tasks, separated by commas; by default all tasks of the checkpoint.
        out: JSON-lines file for the results.
        plot: plot to write, .png or .svg.
        device: "cpu", "cuda" or "auto".
    """
    unknown = set(tasks) - set(TASKS)
    if unknown:
        raise ValueError(f"tasks has {sorted(unknown)}; known: {', '.join(TASKS)}")
    console = report.terminal()
    loaded = load(model, device=device)
    wanted: list[str] = []
    for task in tasks:
        if reason := absent(loaded, task):
            console.print(f"{task}: skipped: {reason}", markup=False)
        else:
            wanted.append(task)
    names = [n for part in presets for n in part.split(",")] or [PLAIN, *preset.names()]
    scores, rejected = tradeoff(loaded, names, wanted, count, episodes, model, data, sim)
    console.print(table(scores, rejected))
    for why in dict.fromkeys(rejected.values()):
        ways = dict.fromkeys(way for (_, way), text in rejected.items() if text == why)
        console.print(f"{', '.join(ways)}: {why}", markup=False)
    if out is not None:
        console.print(f"written to {report.write(out, scores)}", markup=False)
    if plot is not None:
        console.print(f"drawn to {draw(scores, plot)}", markup=False)
    return 0
