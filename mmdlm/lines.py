"""JSON Lines files that are appended to and survive a killed process."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

SURROGATES = re.compile("[\ud800-\udfff]")


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of each complete line; an incomplete last line is removed.

    A process killed while it appends leaves an incomplete last line. The file is truncated in
    place after its last complete line, so that a second kill during the repair loses nothing.

    Args:
        path: the file; a file that does not exist has no lines.
    Raises:
        ValueError: a line is not valid JSON; the file is unchanged.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = 0  # of the complete lines in bytes
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                # Some file systems fill the end of a file with zeros after a power failure.
                if line.strip(b"\0 \t\r")[:1] not in (b"", b"{"):
                    raise ValueError(
                        f"{path} is not a results file: its last line {line[:40]!r} does not begin "
                        "with {; pass another output file"
                    )
                file.truncate(size)
                return
            size += len(line)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number} is not valid JSON ({error}); correct it, or pass "
                    "another output file"
                ) from error
            yield number, value


def as_line(value: Any) -> bytes:
    """A value as a line of JSON in UTF-8, see `escape`."""
    return (escape(json.dumps(value, ensure_ascii=False)) + "\n").encode("utf-8")


def escape(text: str) -> str:
    """Text with each byte of a file name that is not UTF-8 written as %XX.

    Python holds such bytes as lone surrogates, which UTF-8 and most JSON readers do not accept.
    """

    def written(found: re.Match[str]) -> str:
        try:
            data = os.fsencode(found[0])
        except UnicodeEncodeError:  # half of a surrogate pair, not a byte of a name
            data = found[0].encode("utf-8", "surrogatepass")
        return quote(data, safe="")

    return SURROGATES.sub(written, text)
