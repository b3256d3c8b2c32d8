"""Rows of text files: JSON Lines, JSON, CSV and TSV, with the place of each row in errors."""

from __future__ import annotations

import codecs
import csv
import json
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

SEPARATORS = {".csv": ",", ".tsv": "\t"}
EXTENSIONS = (".jsonl", ".json", *SEPARATORS)
LIMIT = 1 << 30  # characters of a value; an image as a data URL is longer than the default
TRIED = 20  # rows of which one must be valid, for a file to be known
HEAD = 1 << 16  # characters of a large JSON list that are parsed for its first row


Entry = tuple[str, Any]
"""Place and value of an entry of a file; the value is an error if the entry is not valid."""


def rows(path: Path, quotes: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each row of a file, see `entries`.

    Raises:
        ValueError: the file or a row is not valid; names the line.
    """
    for place, row in entries(path, quotes):
        if isinstance(row, Exception):
            raise row
        yield place, row


def entries(path: Path, quotes: bool = True) -> Iterator[Entry]:
    """(place, row, or the ValueError of a row that is not valid) of each row of a file.

    Empty lines are skipped.

    Args:
        path: `.csv` and `.tsv` with a header line; `.json` with a list of objects; any other
            extension: JSON Lines.
        quotes: quotation marks in `.csv` and `.tsv` enclose values; False: they belong to them.

    Raises:
        ValueError: the file is not valid as a whole.
    """
    if path.suffix.lower() in SEPARATORS:
        yield from _table(path, csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE)
    elif path.suffix.lower() == ".json":
        found = parsed(path)
        if not isinstance(found, list):
            raise ValueError(f"{path} holds a {type(found).__name__}, expected a list of objects")
        for i, row in enumerate(found):
            yield _entry(f"{path}, entry {i + 1}", _object, row)
    else:
        # Bytes that are not UTF-8 become half surrogates; `_line` rejects their row alone.
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for i, line in enumerate(lines):
                if line.strip():
                    yield _entry(f"{path}, line {i + 1}", _line, line)


def first(path: Path, quotes: bool = True) -> dict[str, Any]:
    """The first valid row of a file, see `rows`; empty if the first `TRIED` are not valid."""
    try:
        if path.suffix.lower() == ".json":
            return _first_of_list(path)
        head = islice(entries(path, quotes), TRIED)
        return next((row for _, row in head if not isinstance(row, Exception)), {})
    except (ValueError, OSError):
        return {}


def parsed(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: it is not valid JSON.
    """
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    _check_utf8(str(path), text)
    return _parsed(text, str(path))


def members(found: Any, name: str, types: Mapping[str, Any], path: Path) -> Iterator[Entry]:
    """(place, entry or its ValueError) of a list of objects in a JSON object.

    Args:
        found: value of the file.
        name: key of the list.
        types: type or union of each value that every entry must have.
        path: for errors.

    Raises:
        ValueError: the list does not exist.
    """
    listed = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(listed, list):
        raise ValueError(f"{path} has no list {name!r}, expected an object with one")

    def checked(place: str, entry: Any) -> Any:
        for key, kind in types.items():
            value = entry.get(key) if isinstance(entry, Mapping) else None
            if not isinstance(value, kind):
                expected = getattr(kind, "__name__", kind)
                raise ValueError(f"{place}: {key} is {value!r}, expected {expected}")
        return entry

    for i, entry in enumerate(listed):
        yield _entry(f"{path}, {name} entry {i + 1}", checked, entry)


def has_keys(path: Path, *names: str) -> bool:
    """Whether a large JSON file is an object that holds all keys somewhere; does not parse it."""
    if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if not data[:HEAD].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            return False
        return all(re.search(rb'"%s"\s*:' % name.encode(), data) for name in names)


def _first_of_list(path: Path) -> dict[str, Any]:
    """The first object of a JSON list, without parsing the rest of a large file."""
    with path.open(encoding="utf-8-sig") as file:
        head = file.read(HEAD).lstrip()
    if not head.startswith("["):
        return {}
    try:
        row, _ = json.JSONDecoder().raw_decode(head[1:].lstrip())
    except ValueError:
        return next((row for _, row in rows(path)), {})
    return row if isinstance(row, dict) else {}


def _table(path: Path, quoting: int) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        separator = SEPARATORS[path.suffix.lower()]
        reader = csv.DictReader(lines, delimiter=separator, quoting=quoting)
        csv.field_size_limit(LIMIT)

        def checked(place: str, row: dict[str, Any]) -> dict[str, Any]:
            if None in row or None in row.values():
                raise ValueError(
                    f"{place} has another number of columns than the header "
                    f"({', '.join(reader.fieldnames or ())}); quote values that hold the separator"
                )
            _check_utf8(place, "".join(row.values()))
            return row

        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                place = f"{path}, line {reader.line_num}"
                yield place, ValueError(f"{place} is not valid ({error}); correct it")
                continue
            if row is None:
                return
            yield _entry(f"{path}, line {reader.line_num}", checked, row)


def _entry(place: str, read: Callable[[str, Any], Any], raw: Any) -> Entry:
    """An entry as a function reads it, or the function's ValueError."""
    try:
        return place, read(place, raw)
    except ValueError as error:
        return place, error


def _line(place: str, text: str) -> dict[str, Any]:
    _check_utf8(place, text)
    return _object(place, _parsed(text, place))


def _check_utf8(place: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is not valid UTF-8; save the file as UTF-8") from error


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({error}); correct it") from error


def _object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} is a {type(row).__name__}, expected an object")
    return dict(row)
