"""Results of measurements, and the machine they were taken on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import mmdlm
from mmdlm.atomic import write_text

DISTRIBUTIONS = ("torch", "numpy", "transformers", "timm", "jiwer", "mujoco", "metaworld") + (
    "sacrebleu",
    "pycocoevalcap",
)


@dataclass(frozen=True)
class Score:
    """One score of a model.

    Args:
        what: benchmark.
        part: subset of the benchmark.
        model: checkpoint.
        decoding: decoding preset.
        metric: name of the metric.
        value: a share in [0, 1]; word error rates may exceed 1.
        count: number of answers, phrases or episodes.
        low: lower end of the 95 % interval, or None.
        high: upper end.
        forwards: mean backbone forwards per answer.
        ms: wall time per answer in milliseconds, with this batch.
        batch: answers decoded together.
        settings: further settings the value depends on.
    """

    what: str
    part: str
    model: str
    decoding: str
    metric: str
    value: float
    count: int
    low: float | None = None
    high: float | None = None
    forwards: float | None = None
    ms: float | None = None
    batch: int = 1
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class Race:
    """Wall times of two models in alternating rounds on the same inputs.

    Args:
        what: benchmark.
        model: the first checkpoint.
        twin: the second one.
        decoding: decoding preset of the first; the second decodes token by token.
        span: "decode", from encoded prompt to tokens, or "answer", from raw input to tokens.
        batch: answers decoded together.
        count: answers per model and round.
        ms: per answer of the first, median over rounds, in milliseconds.
        twin_ms: per answer of the second.
        ratio: time of the twin over time of the model, median over rounds.
        low: smallest of these ratios.
        high: largest.
        forwards: backbone forwards per answer of the first.
        twin_forwards: of the second.
        rounds: number of rounds.
        threads: number of torch threads.
    """

    what: str
    model: str
    twin: str
    decoding: str
    span: str
    batch: int
    count: int
    ms: float
    twin_ms: float
    ratio: float
    low: float
    high: float
    forwards: float
    twin_forwards: float
    rounds: int
    threads: int


@dataclass(frozen=True)
class Comparison:
    """Two models, or two decodings, on the same questions.

    Args:
        what: benchmark.
        part: subset of the benchmark.
        model: the first.
        against: the second.
        metric: name of the metric.
        value: score of the first, see `Score`.
        other: score of the second.
        difference: value minus other.
        low: lower end of the 95 % interval of the difference, from paired resamples.
        high: upper end.
        wins: answers of the first that score better than those of the second.
        losses: answers that score worse.
        ties: answers that score the same.
    """

    what: str
    part: str
    model: str
    against: str
    metric: str
    value: float
    other: float
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int


Line = Score | Race | Comparison


def machine() -> dict[str, Any]:
    """Date, versions, threads and processor, in plain types."""
    versions = {"python": platform.python_version(), "mmdlm": mmdlm.__version__}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # not installed, so not used
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(out: Path, lines: Items[Line]) -> Path:
    """Writes a JSON-lines file, one measurement with its machine per line; returns the path.

    Args:
        out: file to write; it is overwritten.
        lines: measurements.
    """
    write_text(out, "".join(line + "\n" for line in as_json(lines)))
    return out


def as_json(lines: Items[Line]) -> list[str]:
    """One JSON object per measurement, with the machine it was taken on."""
    about = machine()
    # The thread count of a race has priority over the current one.
    rows = (about | {"kind": type(line).__name__.lower()} | asdict(line) for line in lines)
    return [json.dumps(row) for row in rows]


def terminal() -> Console:
    """Console for results: the terminal, or 100 columns for a file or pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def show(lines: Items[Line], console: Console | None = None) -> None:
    """Prints scores as one table and races as another.

    Args:
        lines: measurements.
        console: the console; None: `terminal()`.
    """
    console = console or terminal()
    scores = [line for line in lines if isinstance(line, Score)]
    races = [line for line in lines if isinstance(line, Race)]
    if scores:
        console.print(_scores(scores))
    if races:
        console.print(_races(races))
    sign(console)


def sign(console: Console) -> None:
    """Prints date, machine and versions below results."""
    about = machine()
    console.print(
        f"{about['date']}  {about['cpu']}, {about['cores']} cores, {about['threads']} threads, "
        f"torch {about['versions']['torch']}, mmdlm {about['versions']['mmdlm']}",
        style="dim",
    )


def _table(title: str, left: str, right: str) -> Table:
    """A table with left-aligned and right-aligned columns."""
    table = Table(title=title, title_justify="left")
    for justify, names in (("left", left), ("right", right)):
        for name in names.split(","):
            table.add_column(name, justify=justify)
    return table


def _scores(scores: Items[Score]) -> Table:
    models = list(dict.fromkeys(score.model for score in scores))
    table = _table(
        f"Scores of {', '.join(models)}", "what,decoding,score", "95 %,of,forwards,ms each"
    )
    for s in scores:
        spread = "" if s.low is None else f"{100 * s.low:.1f}-{100 * s.high:.1f}"
        forwards = "" if s.forwards is None else f"{s.forwards:.1f}"
        time = "" if s.ms is None else f"{s.ms:.1f}"
        whose = f"{s.model}: " if len(models) > 1 else ""
        value = f"{100 * s.value:.1f} % {s.metric}"
        name = f"{whose}{s.what} {s.part.rpartition('/')[2]}"
        table.add_row(name, s.decoding, value, spread, str(s.count), forwards, time)
    return table


def _races(races: Items[Race]) -> Table:
    title = f"{races[0].model} against {races[0].twin}, alternating on the same inputs, one thread"
    table = _table(title, "what,decoding", "batch,ms,twin ms,ratio,range,forwards")
    for r in races:
        table.add_row(
            *(f"{r.what} ({r.span})", r.decoding, str(r.batch), f"{r.ms:.1f}", f"{r.twin_ms:.1f}"),
            *(f"{r.ratio:.2f}x", f"{r.low:.2f}-{r.high:.2f}"),
            f"{r.forwards:.1f} / {r.twin_forwards:.1f}",
        )
    return table
