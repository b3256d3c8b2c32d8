"""Times our decode against the plain one, in alternating rounds and separate processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich.table import Table

import mmdlm
from encoders.checks import Checked, NonNegativeInt, PositiveInt
from mmdlm.benchmarks.report import machine
from mmdlm.loading.weights import devices
from tests.speed.answer_shapes import AnswerShape
from tests.speed.shapes import CHUNK, Shape
from tests.speed.systems import APPROXIMATE, MODES, OURS, PLAIN, Answer, agreement, passes
from tests.speed.worker import Worker

Record = dict[str, Any]
SYSTEMS = (PLAIN, OURS)


@dataclass(frozen=True)
class Setting(Checked):
    """Settings of a measurement.

    Args:
        device: "cpu", "cuda" or "auto".
        dtype: "float32", "bfloat16", "float16"; "auto" is float32 on a CPU, bfloat16 on a GPU.
        threads: number of torch threads; more than one only on an idle machine.
        rounds: timed rounds; None: 3 on a CPU, 10 on a GPU.
        warmup: untimed rounds before; None: 1 on a CPU, 3 on a GPU.
        seed: seed of weights and prompts.
        compile: compile our model (`MultimodalDLM.compile`).
    Raises:
        ValueError: a number is out of range, or the device or dtype is not available.
    """

    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: PositiveInt = 1
    rounds: PositiveInt | None = None
    warmup: NonNegativeInt | None = None
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        place = devices(self.device)[0]
        is_gpu = place.type == "cuda"
        usual = {"rounds": 10 if is_gpu else 3, "warmup": 3 if is_gpu else 1}
        for name, value in usual.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "device", str(place))
        if self.dtype == "auto":
            object.__setattr__(self, "dtype", "bfloat16" if is_gpu else "float32")

    def head(self) -> Record:
        """Its fields in every record."""
        names = ("device", "dtype", "threads", "compile")
        return {name: getattr(self, name) for name in names}

    def turns(self) -> Iterator[tuple[int, bool]]:
        """Number of each round, negative for warm-ups, and whether it is a warm-up."""
        for number in range(-self.warmup, self.rounds):
            yield number, number < 0


def race(
    shapes: Items[Shape | AnswerShape],
    modes: Items[str],
    setting: Setting,
    kind: str = "decode",
    systems: Items[str] = SYSTEMS,
    on_record: Callable[[Record], None] | None = None,
    do: Literal["decode", "ask"] = "decode",
) -> list[Record]:
    """Runs the systems alternately within each round; one record per run.

    Args:
        shapes: the shapes to decode, or to ask about.
        modes: see `systems.MODES`.
        setting: settings of the measurement.
        kind: kind of the records.
        systems: the systems; with both, the gate compares them within a round.
        on_record: called with each new record.
        do: what the processes do.
    Raises:
        RuntimeError: a process failed.
    """
    records: list[Record] = []
    with ExitStack() as stack:
        workers = {s: stack.enter_context(Worker(s, setting.threads)) for s in systems}
        about = {"kind": kind, **machine(), **setting.head(), "version": mmdlm.__version__}
        for shape in shapes:
            for mode in modes:
                for number, is_warmup in setting.turns():
                    turn = {}
                    for system, worker in workers.items():
                        turn[system] = worker.request(
                            do=do,
                            **{"system": system, "shape": shape.name, "mode": mode},
                            **{"device": setting.device, "dtype": setting.dtype},
                            **{"seed": setting.seed, "compiled": setting.compile},
                        )
                    for record in _records(shape, mode, number, is_warmup, turn, setting):
                        records.append(about | record)
                        if on_record is not None:
                            on_record(records[-1])
    return records


def _records(
    shape: Shape | AnswerShape,
    mode: str,
    number: int,
    is_warmup: bool,
    turn: dict[str, Record],
    setting: Setting,
) -> Iterator[Record]:
    """The records of one round; ours with gate and agreement."""
    answers = {s: Answer(one.pop("tokens"), one["forwards"]) for s, one in turn.items()}
    new = shape.batch * shape.length
    for system, one in turn.items():
        seconds = one["seconds"]
        record = {
            **{"shape": shape.name, "system": system, "mode": mode, "refresh": MODES[mode]},
            **{"round": number, "warmup": is_warmup, "new_tokens": new, "seed": setting.seed},
            **{"tokens_per_s": new / seconds, "tokens_per_forward": new / one["forwards"]},
            "ms_per_forward": 1e3 * seconds / one["forwards"],
            **one,
        }
        if (
            isinstance(shape, Shape) and shape.block == shape.length
        ):  # a chunk of actions in one block
            record["queries_per_s"] = shape.batch / seconds
            record["actions_per_s"] = CHUNK * shape.batch / seconds
        if system == OURS and PLAIN in answers:
            record["agreement"] = agreement(answers[OURS].tokens, answers[PLAIN].tokens)
            gate = passes(shape, setting.dtype, answers[OURS], answers[PLAIN])
            record["gate"] = None if mode in APPROXIMATE else gate
        yield record


def write(out: Path, records: Items[Record]) -> Path:
    """Writes one JSON line per record, overwriting the file; returns the path."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return out


def timed(records: Items[Record], shape: str, mode: str, system: str) -> list[Record]:
    """Timed records of one shape, mode and system, by round."""
    named = {"shape": shape, "mode": mode, "system": system, "warmup": False}
    found = [r for r in records if all(r.get(k) == v for k, v in named.items())]
    return sorted(found, key=lambda r: r["round"])


def ratios(theirs: Items[Record], ours: Items[Record], key: str) -> list[float]:
    """Ratio theirs / ours of each round that both have."""
    mine = {record["round"]: record for record in ours}
    pairs = [(r, mine[r["round"]]) for r in theirs if r["round"] in mine]
    return [a[key] / b[key] for a, b in pairs if a[key] is not None and b[key]]


def spread(values: Items[float]) -> str:
    """Median, and the range in a second line, for example 2.10x, 2.05-2.20."""
    if not values:
        return "-"
    middle = f"{median(values):.2f}x"
    return middle if len(values) == 1 else f"{middle}\n{min(values):.2f}-{max(values):.2f}"


def table(records: Items[Record]) -> Table:
    """Plain over ours, one row per shape and mode: median over rounds of the ratio, and range."""
    title = "plain sampler over mmdlm: median of the ratios within rounds, and their range"
    built = Table(title=title, title_justify="left")
    for name in ("shape", "mode"):
        built.add_column(name, no_wrap=True)
    for name in ("ms", "CPU time", "wall time", "extra MB", "memory", "forwards", "same tokens"):
        built.add_column(name, justify="right", no_wrap=name != "same tokens")
    for shape, mode in dict.fromkeys((r["shape"], r["mode"]) for r in records):
        theirs, ours = (timed(records, shape, mode, system) for system in SYSTEMS)
        if not theirs or not ours:
            continue
        built.add_row(
            *(shape, mode, middle(theirs, ours, "seconds", 1e3)),
            *(spread(ratios(theirs, ours, key)) for key in ("cpu_seconds", "seconds")),
            middle(theirs, ours, "peak_extra_mb", 1),
            _peaks(theirs, ours),
            f"{theirs[0]['forwards']} > {ours[0]['forwards']}",
            _gate(ours),
        )
    return built


def middle(
    theirs: Items[Record], ours: Items[Record], key: str, scale: float, digits: int = 0
) -> str:
    """Two medians, for example 120 > 60."""
    sides = [[r[key] for r in side if r[key] is not None] for side in (theirs, ours)]
    return " > ".join(f"{scale * median(side):.{digits}f}" if side else "-" for side in sides)


def _peaks(theirs: Items[Record], ours: Items[Record]) -> str:
    """Ratio of peak memory, plain over ours."""
    found = ratios(theirs, ours, "peak_extra_mb")
    return f"{median(found):.1f}x" if found else "-"


def _gate(ours: Items[Record]) -> str:
    """Result of the gate; for approximate modes, the share of equal tokens."""
    share = min(r["agreement"] for r in ours)
    if ours[0]["gate"] is None:
        return f"{100 * share:.0f} % of {APPROXIMATE[ours[0]['mode']]}"
    return "yes" if all(r["gate"] for r in ours) else f"gate: false, {100 * share:.1f} %"


def latencies(records: Items[Record]) -> Table:
    """Latency of a query: median, 95th percentile, and actions per second."""
    built = Table(title="mmdlm: latency of one query", title_justify="left")
    for name in ("shape", "mode"):
        built.add_column(name, no_wrap=True)
    for name in ("p50 ms", "p95 ms", "queries/s", "actions/s"):
        built.add_column(name, justify="right")
    for shape, mode in dict.fromkeys((r["shape"], r["mode"]) for r in records):
        ours = timed(records, shape, mode, OURS)
        times = sorted(r["seconds"] for r in ours)
        if not times:
            continue
        late = times[min(len(times) - 1, round(0.95 * (len(times) - 1)))]
        row = (1e3 * median(times), 1e3 * late)
        rates = (median(r[key] for r in ours) for key in ("queries_per_s", "actions_per_s"))
        built.add_row(shape, mode, *(f"{value:.1f}" for value in (*row, *rates)))
    return built
