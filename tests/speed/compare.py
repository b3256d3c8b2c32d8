"""Compares two files of records, for example before and after a change."""

from __future__ import annotations

import json
from collections.abc import Sequence as Items
from pathlib import Path

from rich.table import Table

from tests.speed.decode_speed import Record, ratios, spread

WHAT = ("shape", "mode", "system")


def read(path: Path) -> list[Record]:
    """Timed records of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a record, or there are only warm-ups.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; make one with decode --json")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            counts = not record["warmup"] and record["seconds"] and all(record[k] for k in WHAT)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a record of python -m tests.speed: {error}"
            ) from error
        records += [record] if counts else []
    if not records:
        raise ValueError(f"{path}: no timed round; warm-ups do not count")
    return records


def pairs(a: Items[Record], b: Items[Record]) -> dict[tuple[str, ...], tuple[list, list]]:
    """Records by shape, mode and system that both files have.

    If each file has only one system and they differ, these two are compared.

    Raises:
        ValueError: there are no common records.
    """
    systems = [{record["system"] for record in side} for side in (a, b)]
    crossed = len(systems[0]) == len(systems[1]) == 1 and systems[0] != systems[1]
    name = " > ".join(str(*side) for side in systems) if crossed else ""

    def by_key(side: Items[Record]) -> dict[tuple[str, ...], list[Record]]:
        found: dict[tuple[str, ...], list[Record]] = {}
        for record in side:
            key = tuple(record[k] for k in WHAT[:2]) + (name or record["system"],)
            found.setdefault(key, []).append(record)
        return found

    left, right = by_key(a), by_key(b)
    common = {key: (left[key], right[key]) for key in left if key in right}
    if not common:
        raise ValueError(
            f"the files share no shape, mode and system; {sorted(left)} against {sorted(right)}"
        )
    return common


def table(a: Items[Record], b: Items[Record]) -> Table:
    """Ratios first / second, with rounds paired by their number."""
    title = "first file over second: median of the ratios within rounds, and their range"
    built = Table(title=title, title_justify="left")
    for name in ("shape", "mode", "system"):
        built.add_column(name, no_wrap=True)
    for name in ("CPU time", "wall time", "extra memory", "forwards", "same tokens"):
        built.add_column(name, justify="right")
    for (shape, mode, system), (left, right) in pairs(a, b).items():
        keys = ("cpu_seconds", "seconds", "peak_extra_mb")
        built.add_row(
            *(shape, mode, system),
            *(spread(ratios(left, right, key)) for key in keys),
            " > ".join(str(side[0].get("forwards", "-")) for side in (left, right)),
            _same(left, right),
        )
    return built


def _same(left: Items[Record], right: Items[Record]) -> str:
    """Whether the tokens are equal; "-" without tokens."""
    shas = {record.get("tokens_sha") for record in (*left, *right)}
    if shas == {None}:
        return "-"
    return "yes" if len(shas) == 1 else "no"
