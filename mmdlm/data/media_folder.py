"""Folders of images or audio with texts: metadata.jsonl or metadata.csv, or a .txt per file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from glob import escape
from pathlib import Path
from typing import Any, ClassVar

from mmdlm.data.conversations import Conversations, Row, exchange
from mmdlm.data.records import Entry, entries, first
from mmdlm.media import media_kind

TABLES = ("metadata.jsonl", "metadata.csv")
"""Tables of a Hugging Face imagefolder or audiofolder."""
TEXTS = ("text", "caption", "transcription", "transcript", "sentence", "answer")
"""Columns that may hold the text."""
FILES = ("file_name", "image_file_name", "audio_file_name", "image", "audio", "path")
"""Columns that may hold the file name."""


class MediaFolder(Conversations):
    """Images or audio clips of a folder, each with one text.

    The texts are in metadata.jsonl or metadata.csv with a column file_name (the convention of
    Hugging Face's imagefolder and audiofolder) and one of `TEXTS`; a column "question" is the
    prompt. Without a table, every file has its text beside it: cat.jpg and cat.txt.

    Args:
        path: the folder.
        text: column of the text; None: the first of `TEXTS` that exists.
        length: see `Conversations`.
        prompt: see `Conversations`.
    """

    EXAMPLE: ClassVar[str] = (
        'photos/metadata.jsonl:  {"file_name": "cat.jpg", "text": "A cat on a mat."}\n'
        "or photos/cat.jpg beside photos/cat.txt"
    )

    def __init__(
        self,
        path: Path,
        text: str | None = None,
        length: int | None = None,
        prompt: str | None = None,
    ) -> None:
        self.text = text
        super().__init__(path, length, prompt)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Conversations.matches`."""
        if path.is_file():
            return path.name in TABLES and any(name in first(path) for name in FILES)
        if any((path / name).is_file() for name in TABLES):
            return True
        return any(medium(file) is not None for file in path.rglob("*.txt"))

    def entries(self) -> Iterator[Entry]:
        """See `Conversations.entries`; of files with a text beside them (file, text)."""
        tables = [self.path] if self.path.is_file() else [self.path / name for name in TABLES]
        table = next((file for file in tables if file.is_file()), None)
        if table is not None:
            yield from entries(table)
            return
        for text in sorted(self.path.rglob("*.txt")):
            file = medium(text)
            if file is not None:
                yield str(text), (file, text)

    def row(self, entry: Any, place: str) -> Row:
        """See `Conversations.row`."""
        if isinstance(entry, tuple):
            file, text = entry
            answer = text.read_text(encoding="utf-8-sig").strip()
            return about(str(file.relative_to(self.path)), answer, None, place)
        file = column(entry, FILES, place)
        answer = column(entry, TEXTS if self.text is None else (self.text,), place)
        return about(file, answer, entry.get("question"), place)


def medium(text: Path) -> Path | None:
    """The image or clip with the name of a text file, in its folder; None if there is none."""
    files = (file for file in text.parent.glob(f"{escape(text.stem)}.*") if file != text)
    return next((file for file in sorted(files) if media_kind(file) is not None), None)


def column(row: Mapping[str, Any], names: Items[str], place: str) -> str:
    """Value of the first of some columns that a row has.

    Raises:
        ValueError: it has none of them, or the value is not a text.
    """
    name = next((name for name in names if name in row), None)
    if name is None:
        raise ValueError(
            f"{place} has the columns {', '.join(row)}; expected one of {', '.join(names)}"
        )
    if not isinstance(row[name], str):
        raise ValueError(f"{place}: {name} is {row[name]!r}, expected a text")
    return row[name]


def about(file: str, answer: str, question: str | None, place: str) -> Row:
    """A row that asks about one file.

    Args:
        file: image or clip.
        answer: text to learn.
        question: None for the data set's instruction.
        place: for errors.

    Raises:
        ValueError: the extension of the file is unknown.
    """
    kind = media_kind(file)
    if kind is None:
        raise ValueError(f"{place}: {file} is neither an image nor a clip by its extension")
    return exchange([(kind, file)], question, answer)
