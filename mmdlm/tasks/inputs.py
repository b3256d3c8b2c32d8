"""Identity of the input files of a job: path from the results file, size, time and digest."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from mmdlm.media.search import place

ESCAPED = re.compile("[%\ud800-\udfff]")


class Inputs:
    """Recognises input files in the records of a results file.

    A record holds as "input": "path", relative to the folder of the results file; "size" in bytes;
    "time" of the last change in microseconds since 1970; "digest" of the content. In "path", bytes
    that are not UTF-8, and the percent sign, are written as %XX, as in a URL.

    Args:
        out: the results file.
    """

    def __init__(self, out: Path) -> None:
        self._near = os.path.abspath(out.parent)
        self._root = os.path.dirname(os.path.realpath(out))
        self._folders: dict[str, str] = {}

    def key(self, file: str | Path) -> str:
        """Absolute path of a file, the same for every way to write it."""
        return place(Path(file), self._folders)

    def key_of(self, record: Mapping[str, Any]) -> str:
        """Key of the file of a record; of the first edition's, "file" is used as it is."""
        source = record.get("input")
        if source is None:
            return self.key(record["file"])
        return self.key(os.path.join(self._root, os.fsdecode(unquote_to_bytes(source["path"]))))

    def identify(self, file: Path) -> dict[str, Any]:
        """What a record holds as "input"; only the path of a file that cannot be opened."""
        source: dict[str, Any] = {"path": self._path(file)}
        try:
            status = file.stat()
            digest = _digest(file)
        except OSError:
            return source
        return {**source, "size": status.st_size, "time": _time(status), "digest": digest}

    def is_unchanged(self, file: Path, source: Mapping[str, Any] | None) -> bool:
        """Whether a file is as it was; a copy with another time is compared by its digest.

        Args:
            file: the file.
            source: its "input" in a record; None: of the first edition, nothing is known.
        """
        if source is None:
            return True
        try:
            status = file.stat()
            if status.st_size != source.get("size"):
                return False
            return _time(status) == source.get("time") or _digest(file) == source.get("digest")
        except OSError:
            return False

    def _path(self, file: Path) -> str:
        """Relative path, through the links as they were given if it is below the results file."""
        path, near = os.path.abspath(file), os.path.join(self._near, "")
        is_below = path.startswith(near) and os.path.realpath(near) == self._root
        path = path[len(near) :] if is_below else _relative(self.key(file), self._root)
        text = path.replace(os.sep, "/")
        return ESCAPED.sub(lambda found: quote(os.fsencode(found[0]), safe=""), text)


def _relative(path: str, root: str) -> str:
    try:
        return os.path.relpath(path, root)
    except ValueError:  # another drive of Windows
        return path


def _time(status: os.stat_result) -> int:
    return status.st_mtime_ns // 1000


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, lambda: hashlib.blake2b(digest_size=12)).hexdigest()
