"""Tables: one question, answer and media per row, in columns the user can name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mmdlm import discover
from mmdlm.data import chat, llava
from mmdlm.data.conversations import Conversations, Row, exchange
from mmdlm.data.media_folder import TEXTS
from mmdlm.data.records import EXTENSIONS, Entry, entries, first
from mmdlm.media import media_kind

KNOWN = {
    "image": ("image", "images", "img", "image_path", "image_file", "image_file_name"),
    "audio": ("audio", "audios", "wav", "audio_path", "audio_filepath", "audio_file_name"),
    "question": ("question", "prompt", "instruction", "query"),
    "answer": ("answer", "answers", "captions", "completion", "response", "output", *TEXTS),
    "system": ("system",),
}
"""Columns that are used where the user names none; the first that exists."""
FILES = ("file_name", "filename", "file", "path")
"""Columns of images or clips, by the extension of each value."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table; None: none, or one of `KNOWN` in `found`.

    Args:
        image: file name of an image, or a list.
        audio: file name of a clip, or a list.
        question: prompt; without it media get the data set's instruction.
        answer: text or number to learn; of a list each draw learns one.
        system: text of a system message.
        file: file name of an image or a clip; the kind follows from its extension.
    """

    image: str | None = None
    audio: str | None = None
    question: str | None = None
    answer: str | None = None
    system: str | None = None
    file: str | None = None

    def found(self, names: Mapping[str, Any], place: str) -> Columns:
        """These columns, with the known ones that a table has where the user named none.

        Args:
            names: a value of each column.
            place: for errors.

        Raises:
            ValueError: a column does not exist, there is no answer, or nothing to answer.
        """
        chosen = {
            role: getattr(self, role) or next((c for c in KNOWN[role] if c in names), None)
            for role in KNOWN
        }
        file = None
        if chosen["image"] is None and chosen["audio"] is None:
            file = next((c for c in FILES if media_kind(str(names.get(c))) is not None), None)
        missing = [name for name in chosen.values() if name is not None and name not in names]
        asks = file or chosen["image"] or chosen["audio"] or chosen["question"]
        if missing or not chosen["answer"] or not asks:
            lacks = f"lacks {', '.join(missing)}" if missing else "does not name what to learn"
            raise ValueError(
                f"{place} {lacks}: its columns are {', '.join(names)}; give answer= and one of "
                "image=, audio= and question="
            )
        return Columns(**chosen, file=file)

    def row(self, cells: Mapping[str, Any], place: str) -> Row:
        """One row of the table.

        Args:
            cells: values by column.
            place: for errors.

        Raises:
            ValueError: a column or value is missing, or a value has another type.
        """
        media = [
            (kind, item)
            for kind in ("image", "audio")
            for item in listed(cells.get(getattr(self, kind)))
        ]
        media += [(media_kind(str(item)), item) for item in listed(cells.get(self.file))]
        if any(kind is None for kind, _ in media):
            raise ValueError(
                f"{place}: {cells[self.file]} is neither an image nor a clip by its extension"
            )
        question, system = (_text(cells, name, place) for name in (self.question, self.system))
        answers = [_answer(value, self.answer, place) for value in listed(cells.get(self.answer))]
        if not answers:
            raise ValueError(f"{place}: {self.answer} is empty, expected a text to learn")
        if not media and not question:
            raise ValueError(f"{place} has neither a question nor media")
        if not question:
            return exchange(media, None, answers, system)
        row = exchange((), question, answers, system)
        row["messages"][-2]["content"] = question
        parts = [{"type": kind, kind: item} for kind, item in media]
        return {**row, "messages": chat.placed(row["messages"], parts, place)}

    def conversation(self, cells: Mapping[str, Any], place: str) -> Row:
        """A row of any form: messages, LLaVA's turns, or these or known columns.

        Args:
            cells: values by column.
            place: for errors.

        Raises:
            ValueError: it has none of these forms.
        """
        if self == Columns() and ("messages" in cells or chat.pair(cells) is not None):
            return chat.conversation(cells, place)
        if self == Columns() and "conversations" in cells:
            return llava.conversation(cells, place)
        return self.found(cells, place).row(cells, place)


class Table(Conversations):
    """A CSV, TSV, JSON Lines or JSON file with one question or medium and its answer per row.

    Args:
        path: `.csv` or `.tsv` with a header line, `.jsonl`, or `.json` with a list of objects.
        image: column of an image's file name, or of a list of them; None: see `KNOWN`, `FILES`.
        audio: the same of clips.
        question: column of the prompt; None: see `KNOWN`, or the instruction `prompt`.
        answer: column of the text to learn; of a list each draw learns one. None: see `KNOWN`.
        system: column of a system message.
        folder: folder that file names are relative to; None: that of `path`.
        length: see `Conversations`.
        prompt: see `Conversations`.
    """

    EXAMPLE: ClassVar[str] = "photos.csv:\nimage,caption\ncat.jpg,A cat on a mat.\n"

    def __init__(
        self,
        path: Path,
        image: str | None = None,
        audio: str | None = None,
        question: str | None = None,
        answer: str | None = None,
        system: str | None = None,
        folder: Path | None = None,
        length: int | None = None,
        prompt: str | None = None,
    ) -> None:
        self.columns = Columns(image, audio, question, answer, system)
        super().__init__(path, length, prompt)
        if folder is not None:
            self.root = Path(folder)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Conversations.matches`; a table that another format reads is not one of these."""
        if not cls.reads(path):
            return False
        try:
            Columns().found(first(path), "")
        except ValueError:
            return False
        others = discover.classes("mmdlm.data", Conversations).values()
        return not any(other.matches(path) for other in others if other is not cls)

    @classmethod
    def reads(cls, path: Path) -> bool:
        """See `Conversations.reads`."""
        return path.suffix.lower() in EXTENSIONS and path.is_file() and bool(first(path))

    def entries(self) -> Iterator[Entry]:
        """See `Conversations.entries`; also finds the columns, in a first pass over the file."""
        names: dict[str, Any] = {}
        for _, cells in entries(self.path):
            if not isinstance(cells, Exception):
                names |= {name: value for name, value in cells.items() if not names.get(name)}
        self.columns = self.columns.found(names, str(self.path))
        return entries(self.path)

    def row(self, entry: dict[str, Any], place: str) -> Row:
        """See `Conversations.row`."""
        return self.columns.row(entry, place)


def listed(value: Any) -> list[Any]:
    """The values of a cell: none if it is empty, several if it holds a list."""
    if isinstance(value, list | tuple):
        return [one for one in value if one is not None]
    return [] if value is None or value == "" else [value]


def _text(cells: Mapping[str, Any], name: str | None, place: str) -> str | None:
    value = cells.get(name) if name else None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{place}: {name} is {value!r}, expected a text")
    return value


def _answer(value: Any, name: str | None, place: str) -> str:
    """A text to learn; numbers as they are written."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{place}: {name} is {value!r}, expected a text or a number")
    return str(value)
