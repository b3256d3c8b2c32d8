"""Times our training step against the published trainers' one, in alternating rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack

from rich.table import Table

import mmdlm
from mmdlm.benchmarks.report import machine
from tests.speed.decode_speed import SYSTEMS, Record, Setting, middle, ratios, spread, timed
from tests.speed.systems import OURS, PLAIN
from tests.speed.train_shapes import TrainShape
from tests.speed.worker import Worker

MODE = "train"
TOLERANCE = 1e-5
"""Largest relative difference of the losses."""


def race(
    shapes: Items[TrainShape],
    setting: Setting,
    systems: Items[str] = SYSTEMS,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Runs the systems alternately within each round; one record per step.

    Each shape has new processes, so that no step reuses the memory of a larger one.

    Args:
        shapes: what is trained.
        setting: settings of the measurement.
        systems: the systems; with both, the gate compares their losses within a round.
        on_record: called with each new record.
    Raises:
        RuntimeError: a process failed.
    """
    records: list[Record] = []
    about = {"kind": MODE, **machine(), **setting.head(), "version": mmdlm.__version__}
    for shape in shapes:
        with ExitStack() as stack:
            workers = {s: stack.enter_context(Worker(s, setting.threads)) for s in systems}
            for number, is_warmup in setting.turns():
                turn = {
                    system: worker.request(
                        do="train",
                        **{"system": system, "shape": shape.name, "seed": setting.seed},
                        **{"device": setting.device, "dtype": setting.dtype},
                    )
                    for system, worker in workers.items()
                }
                for record in _records(shape, turn):
                    where = {"round": number, "warmup": is_warmup, "seed": setting.seed}
                    records.append(about | where | record)
                    if on_record is not None:
                        on_record(records[-1])
    return records


def _records(shape: TrainShape, turn: dict[str, Record]) -> Iterator[Record]:
    """The records of one round; ours with the gate."""
    for system, one in turn.items():
        record = {"shape": shape.name, "system": system, "mode": MODE, **one}
        record["tokens_per_s"] = shape.tokens / one["cpu_seconds"]
        if system == OURS and PLAIN in turn:
            theirs = turn[PLAIN]["loss"]
            record["gate"] = math.isclose(one["loss"], theirs, rel_tol=TOLERANCE)
        yield record


def table(records: Items[Record]) -> Table:
    """Plain over ours, one row per shape: median over rounds of the ratio, and range."""
    title = "plain training step over mmdlm: median of the ratios within rounds, and their range"
    built = Table(title=title, title_justify="left")
    built.add_column("shape", no_wrap=True)
    for name in ("CPU s", "CPU time", "tokens/s", "extra MB", "memory", "loss"):
        built.add_column(name, justify="right", no_wrap=True)
    for shape in dict.fromkeys(r["shape"] for r in records):
        theirs, ours = (timed(records, shape, MODE, system) for system in SYSTEMS)
        if not theirs or not ours:
            continue
        built.add_row(
            *(shape, middle(theirs, ours, "cpu_seconds", 1, 2)),
            spread(ratios(theirs, ours, "cpu_seconds")),
            middle(theirs, ours, "tokens_per_s", 1),
            middle(theirs, ours, "peak_extra_mb", 1),
            spread(ratios(theirs, ours, "peak_extra_mb")[:1]),
            "same" if all(r["gate"] for r in ours) else "gate: false",
        )
    return built


def parts(records: Items[Record]) -> Table:
    """Where the time of our step goes: percent of its CPU time, the median round of each shape."""
    built = Table(title="mmdlm: CPU time of a step, percent", title_justify="left")
    built.add_column("shape", no_wrap=True)
    rows = {shape: timed(records, shape, MODE, OURS) for shape in {r["shape"]: 0 for r in records}}
    names = [name for ours in rows.values() for name in ours[:1] and ours[0]["parts"]]
    names = list(dict.fromkeys(names))
    for name in names:
        built.add_column(name, justify="right")
    for shape, ours in rows.items():
        if ours:
            one = sorted(ours, key=lambda r: r["cpu_seconds"])[len(ours) // 2]
            total = sum(one["parts"].values())
            built.add_row(shape, *(f"{100 * one['parts'][name] / total:.0f}" for name in names))
    return built
