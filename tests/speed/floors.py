"""Roofline of shapes, and the share of it that our decode reaches."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from statistics import median

import torch
from rich.table import Table

from tests.speed.decode_speed import Record, Setting, race, timed
from tests.speed.roofline import H200, Rates, floor
from tests.speed.shapes import Shape
from tests.speed.systems import OURS
from tests.speed.worker import Worker


def known(shapes: Items[Shape], modes: Items[str]) -> Table:
    """Floors on an H200 in bfloat16, where the number of steps is fixed."""
    table = _table("H200, bfloat16", H200, ("floor ms", "tokens/s"))
    for shape in shapes:
        for mode in modes:
            seconds = floor(shape, mode, H200)
            tokens = shape.batch * shape.length / seconds
            table.add_row(shape.name, mode, f"{1e3 * seconds:.2f}", f"{tokens:.0f}")
    return table


def measured(
    shapes: Items[Shape],
    modes: Items[str],
    setting: Setting,
    on_record: Callable[[Record], None] | None = None,
) -> tuple[list[Record], Table]:
    """Our records with floor_ms and the share reached, and a table of medians.

    Args:
        shapes: the shapes to decode.
        modes: see `systems.MODES`.
        setting: settings of the measurement.
        on_record: see `decode_speed.race`.
    """
    with Worker("the roofline", setting.threads) as worker:
        found = worker.request(do="rates", device=setting.device, dtype=setting.dtype)
    rates = Rates(**found)
    size = getattr(torch, setting.dtype).itemsize
    by_name = {shape.name: shape for shape in shapes}
    records = race(shapes, modes, setting, "roofline", (OURS,), on_record)
    for record in records:
        shape, mode = by_name[record["shape"]], record["mode"]
        # Ours computes the prompt of a prefix-LM together with the first step.
        record["floor_ms"] = 1e3 * floor(shape, mode, rates, record["forwards"], size)
        record["reached"] = record["floor_ms"] / (1e3 * record["seconds"])
        record |= vars(rates)
    columns = ("floor ms", "ms", "reached", "tokens/s")
    table = _table(f"{setting.device}, {setting.dtype}", rates, columns)
    for name in by_name:
        for mode in modes:
            mine = timed(records, name, mode, OURS)
            keys = ("floor_ms", "seconds", "reached", "tokens_per_s")
            least, seconds, reached, speed = (median(r[key] for r in mine) for key in keys)
            cells = (f"{least:.1f}", f"{1e3 * seconds:.1f}", f"{100 * reached:.0f} %")
            table.add_row(name, mode, *cells, f"{speed:.1f}")
    return records, table


def _table(where: str, rates: Rates, columns: Items[str]) -> Table:
    """An empty table with the rates of the device as title."""
    copy, matmul = rates.copy / 1e9, rates.matmul / 1e9
    title = f"least time on {where}: {copy:.0f} GB/s, {matmul:.0f} GFLOP/s"
    table = Table(title=title, title_justify="left")
    for name in ("shape", "mode"):
        table.add_column(name, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table
