"""Times encoders of published sizes with random weights on one input."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import ExitStack
from statistics import median

from rich.table import Table

import mmdlm
from mmdlm.benchmarks.report import machine
from tests.speed.decode_speed import Record, Setting
from tests.speed.encoder_shapes import ENCODERS, EncoderShape
from tests.speed.systems import OURS
from tests.speed.worker import Worker


def time_encoders(
    shapes: Items[EncoderShape],
    setting: Setting,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """One record per run; preprocessing is not counted.

    Args:
        shapes: encoders with their inputs.
        setting: settings of the measurement.
        on_record: called with each new record.
    """
    records: list[Record] = []
    with ExitStack() as stack:
        worker = stack.enter_context(Worker("the encoders", setting.threads))
        about = {"kind": "encode", **machine(), **setting.head(), "version": mmdlm.__version__}
        for shape in shapes:
            for number, is_warmup in setting.turns():
                place = {"device": setting.device, "dtype": setting.dtype}
                found = worker.request(do="encode", shape=shape.name, seed=setting.seed, **place)
                named = {"shape": shape.name, "system": OURS, "mode": "encode"}
                turn = {"round": number, "warmup": is_warmup, "seed": setting.seed}
                records.append(about | named | turn | found)
                if on_record is not None:
                    on_record(records[-1])
    return records


def table(records: Items[Record]) -> Table:
    """Median times per encoder."""
    built = Table(title="encoders, one input", title_justify="left")
    built.add_column("shape", no_wrap=True)
    built.add_column("what")
    for name in ("tokens", "ms", "range", "CPU ms", "extra MB"):
        built.add_column(name, justify="right")
    for name in dict.fromkeys(record["shape"] for record in records):
        mine = [r for r in records if r["shape"] == name and not r["warmup"]]
        wall, cpu = ([1e3 * r[key] for r in mine] for key in ("seconds", "cpu_seconds"))
        peaks = [r["peak_extra_mb"] for r in mine if r["peak_extra_mb"] is not None]
        built.add_row(
            *(name, ENCODERS[name].about, str(mine[0]["new_tokens"])),
            *(f"{median(wall):.1f}", f"{min(wall):.1f}-{max(wall):.1f}", f"{median(cpu):.1f}"),
            f"{median(peaks):.0f}" if peaks else "-",
        )
    return built
