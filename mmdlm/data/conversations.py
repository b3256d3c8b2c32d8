"""Conversations from files of users: what all such data sets share."""

from __future__ import annotations

import base64
import binascii
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import unquote, urlsplit

import numpy as np

from mmdlm.data.dataset import Dataset, Extent, Preset
from mmdlm.messages import Example, Media, Message, Slot, Text, conversation
from mmdlm.processor import Processor
from mmdlm.word_list import pieces

Row = Mapping[str, Any]
"""`{"messages": [...]}` with messages as in `mmdlm.messages.conversation`, and optionally "group".
Media are file names relative to the data set's folder, file URLs, data URLs, or what
`mmdlm.media.read_image` and `read_audio` take. "answers" lists the accepted answers of the last
message, for scoring; with `"draw": True` each draw learns one of them."""

PROMPTS = {
    "caption": "Describe the image.",
    "transcribe": "Transcribe the audio.",
    "describe": "Describe the audio.",
}
"""Instruction of media without one by task, where the model has no default."""
NETWORK = ("http", "https", "ftp", "s3", "gs", "hf")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_REJECTED: ContextVar[list[tuple[str, Exception]] | None] = ContextVar("rejected", default=None)


class Conversations(Dataset):
    """Rows of a file or folder as conversations; every assistant message is an answer to learn.

    Subclasses define `matches`, `entries` and `row`. All rows are read at once (texts and file
    names, not media), so a row can be drawn by its number. The first row that is not valid raises;
    within `collecting` such rows are left out and listed.

    Args:
        path: file or folder.
        length: canvas of every answer in tokens; None: that of the model's default for the task,
            or of the longest answer and an end token if that is longer.
        prompt: instruction of media that come with a text alone; None: the model's default for
            the task, else `PROMPTS`.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: the file is on the network or not valid, or it has no rows; names file and line.
    """

    EXAMPLE: ClassVar[str] = ""
    """How the files look, for `mmdlm data formats`."""
    TASKS: ClassVar[Mapping[str, str]] = {"image": "caption", "audio": "transcribe"}
    """Task whose default instruction a model uses for media without one."""

    def __init__(self, path: Path, length: int | None = None, prompt: str | None = None) -> None:
        self.path, self.length = local(path), length
        self.root = self.path if self.path.is_dir() else self.path.parent
        self.prompt, self.stands_alone = prompt, False
        self.longest: int | None = None
        """Tokens of the longest answer and an end token, where they were counted."""
        self.instructions: dict[str, str] = {}
        """Instruction of media without one, by kind; set by `connect`."""
        self.places: list[str] = []
        """File and line of each row, for messages to the user."""
        self.rows: list[Row] = []
        for place, raw in self.entries():
            try:
                row = self._checked(raw, place)
            except ValueError as error:
                reject(place, error)
            else:
                self.places.append(place)
                self.rows.append(row)
        if not self.rows:
            raise ValueError(f"{self.path} has no valid rows, expected at least one")

    @classmethod
    @abstractmethod
    def matches(cls, path: Path) -> bool:
        """Whether a file or folder has this format; looks at its first rows at most."""

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether the class reads a file or folder if the user names its columns."""
        return cls.matches(path)

    @abstractmethod
    def entries(self) -> Iterable[tuple[str, Any]]:
        """(place, entry) of each row of `self.path`; the entry is an error if it is not readable.

        Raises:
            ValueError: the file is not readable as a whole.
        """

    @abstractmethod
    def row(self, entry: Any, place: str) -> Row:
        """One of `entries` as a row.

        Args:
            entry: as in the file.
            place: file and line, for errors.

        Raises:
            ValueError: it is not valid; names the place.
        """

    def __len__(self) -> int:
        return len(self.rows)

    def connect(self, processor: Processor, preset: Preset | None = None) -> Self:
        """See `Dataset.connect`."""
        preset = preset or {}
        for kind in self._alone():
            task = self.TASKS[kind]
            given = (preset.get(task) or {}).get("prompt")
            self.instructions[kind] = self.prompt or given or PROMPTS[task]
        self.stands_alone = processor.jinja is None
        if self.length is None:
            if self.longest is None:
                sizes = (len(processor.encode(answer)) for answer in self._answers())
                self.longest = 1 + max(sizes, default=0)
            # Not shorter than the canvas that the model is used with, as it learns where to end.
            usual = [(preset.get(task) or {}).get("length") or 0 for task, _, _ in self.tasks()]
            self.length = max(self.longest, *usual)
        return self

    def tasks(self) -> list[tuple[str, str | None, int]]:
        """See `Dataset.tasks`: captions or transcripts of media alone, else answers."""
        kinds = {part.kind for part in self._parts() if isinstance(part, Media)}
        if len(kinds) == 1 and kinds == set(self.instructions):
            kind = kinds.pop()
            return [(self.TASKS[kind], self.instructions[kind], self.length)]
        return [("answer" if kinds else "generate", None, self.length)]

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        """The conversation at `index`, with one branch per answer."""
        row = self.rows[index]
        if row.get("draw"):
            row = answered(row, row["answers"][int(rng.integers(len(row["answers"])))])
        messages = [self._located(message) for message in self.messages(row)]
        return Example((), tuple(self.branches(messages)), row.get("group", ""))

    def branches(self, messages: Items[Message]) -> Iterator[tuple[Message, ...]]:
        """A conversation up to each of its answers, which becomes a slot."""
        for i, message in enumerate(messages):
            if message.role == "assistant":
                slot = Slot("text", self.length, message.text)
                before = messages[:i] if not self.stands_alone else _last(messages[:i])
                yield (*before, Message("assistant", (slot,)))

    def extent(self, index: int) -> Extent:
        """See `Dataset.extent`."""
        branches = self.branches(self.messages(self.rows[index]))
        *before, last = max(branches, key=lambda branch: sum(len(m.text) for m in branch))
        media = Counter(p.kind for m in before for p in m.parts if isinstance(p, Media))
        slot = last.parts[0]
        return Extent("".join(m.text for m in before), slot.value, slot.length, media)

    def accepted(self, index: int) -> list[str]:
        """See `Dataset.accepted`."""
        return list(self.rows[index].get("answers", ()))

    def place(self, index: int) -> str:
        """File and line of a row."""
        return self.places[index]

    def vocabulary(self) -> list[str]:
        """Every word of all messages and of the instruction."""
        texts = [part.text for part in self._parts() if isinstance(part, Text)]
        texts += [self.prompt or PROMPTS[self.TASKS[kind]] for kind in self._alone()]
        return sorted({piece for text in (*texts, *self._answers()) for piece in pieces(text)})

    def texts(self, index: int) -> list[str]:
        """All messages of a row, every accepted answer, and the instruction of media alone."""
        row = self.rows[index]
        kind = alone(row)
        asked = [self.prompt or PROMPTS[self.TASKS[kind]]] if kind else []
        messages = [m.text for m in conversation(row["messages"]) if m.role != "assistant"]
        return [*filter(None, messages), *asked, *answers(row)]

    def item(self, item: Any) -> Any:
        """A media item of a row as `mmdlm.media.read_image` and `read_audio` take it."""
        return located(item, self.root)

    def messages(self, row: Row) -> tuple[Message, ...]:
        """Messages of a row; media without any text get the instruction."""
        messages = conversation(row["messages"])
        kind = alone(row)
        instruction = self.prompt or self.instructions.get(kind)
        if kind is None or instruction is None:
            return messages
        return tuple(
            Message(m.role, (*m.parts, Text(instruction))) if m.role == "user" else m
            for m in messages
        )

    def _alone(self) -> list[str]:
        """Kinds of media that come without a question, sorted."""
        return sorted(set(filter(None, map(alone, self.rows))))

    def _parts(self) -> Iterator[Any]:
        return (p for row in self.rows for m in conversation(row["messages"]) for p in m.parts)

    def _answers(self) -> Iterator[str]:
        return (answer for row in self.rows for answer in answers(row))

    def _checked(self, entry: Any, place: str) -> Row:
        """An entry as a row with valid messages.

        Raises:
            ValueError: it is not valid; names the place.
        """
        if isinstance(entry, Exception):
            raise entry
        try:
            row = self.row(entry, place)
            messages = conversation(row["messages"])
        except (TypeError, LookupError, AttributeError, ValueError) as error:
            if isinstance(error, ValueError) and str(error).startswith(place):
                raise
            said = f"lacks {error}" if isinstance(error, KeyError) else f"{error}"
            raise ValueError(f"{place}: {said}") from error
        if all(message.role != "assistant" for message in messages):
            raise ValueError(
                f"{place} has no message of the assistant, so there is nothing to learn"
            )
        return row

    def _located(self, message: Message) -> Message:
        parts = (
            Media(part.kind, self.item(part.item)) if isinstance(part, Media) else part
            for part in message.parts
        )
        return Message(message.role, tuple(parts))


def alone(row: Row) -> str | None:
    """Kind of a row's media if its questions have no text, else None."""
    asked = [m for m in conversation(row["messages"]) if m.role == "user"]
    if any(m.text for m in asked):
        return None
    media = (part for m in asked for part in m.parts if isinstance(part, Media))
    return next((part.kind for part in media), None)


def answers(row: Row) -> list[str]:
    """Every text that a row teaches."""
    if row.get("draw"):
        return list(row["answers"])
    return [m.text for m in conversation(row["messages"]) if m.role == "assistant"]


@contextmanager
def collecting() -> Iterator[list[tuple[str, Exception]]]:
    """Within it, data sets leave out rows that are not valid; gives their (place, error)."""
    rejected: list[tuple[str, Exception]] = []
    token = _REJECTED.set(rejected)
    try:
        yield rejected
    finally:
        _REJECTED.reset(token)


def reject(place: str, error: Exception) -> None:
    """Raises the error of a row, or lists it within `collecting`."""
    rejected = _REJECTED.get()
    if rejected is None:
        raise error
    rejected.append((place, error))


def exchange(
    media: Items[tuple[str, Any]],
    question: str | None,
    answers: str | Items[str],
    system: str | None = None,
) -> Row:
    """A row of one question and its answer.

    Args:
        media: (kind, item) of images and clips, which go before the question.
        question: None for the data set's instruction.
        answers: the answer; of several, each draw learns one.
        system: text of a system message, if any.
    """
    parts = [{"type": kind, kind: item} for kind, item in media]
    parts += [{"type": "text", "text": question}] if question else []
    several = [answers] if isinstance(answers, str) else list(answers)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": several[0]},
    ]
    row = {"messages": messages}
    return row if len(several) == 1 else {**row, "answers": several, "draw": True}


def answered(row: Row, answer: str) -> Row:
    """A row with another text in its last message."""
    *before, last = row["messages"]
    return {**row, "messages": [*before, {**last, "content": answer}]}


def _last(messages: Items[Message]) -> list[Message]:
    """The last question with all media, for models without a chat template."""
    media = [p for m in messages[:-1] for p in m.parts if isinstance(p, Media)]
    last = messages[-1:]
    return [Message(last[0].role, (*media, *last[0].parts))] if last else []


def files(path: Path) -> list[Path]:
    """The files that a path with ranges, as in `part-{000..012}.tar`, names; itself without any."""
    found = RANGE.search(str(path))
    if found is None:
        return [path]
    first, last = found.groups()
    before, after = str(path)[: found.start()], str(path)[found.end() :]
    numbers = range(int(first), int(last) + 1)
    return [file for i in numbers for file in files(Path(f"{before}{i:0{len(first)}}{after}"))]


def local(path: Path) -> Path:
    """A file, a folder or a path with ranges, all on this machine.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: it is a network address; rows cannot be streamed.
    """
    scheme, colon, rest = str(path).partition(":")
    if colon and scheme.lower() in NETWORK and rest.startswith("/"):
        raise ValueError(
            f"{path} is on the network, expected a local path; download it first, because rows are "
            "drawn in any order and are not streamed"
        )
    named = files(Path(path))
    missing = next((file for file in named if not file.exists()), None)
    if missing is not None or not named:
        raise FileNotFoundError(f"{missing or path} does not exist")
    return Path(path)


def located(item: Any, root: Path) -> Any:
    """An item with its file name resolved and its data URL decoded.

    Args:
        item: file name relative to `root`, `file:` URL, `data:...;base64,...` URL, or anything
            else, which is returned unchanged.
        root: folder of the data set.

    Raises:
        ValueError: a URL has another scheme, or its base64 data are not valid.
    """
    if not isinstance(item, str | Path):
        return item
    text = str(item)
    scheme = urlsplit(text).scheme
    if scheme == "data":
        header, _, data = text.partition(",")
        if not header.endswith(";base64"):
            raise ValueError(f"{header[:60]!r} is not a base64 data URL; expected data:...;base64,")
        try:
            return base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise ValueError(f"{header[:60]!r} holds damaged base64 data ({error})") from error
    if scheme == "file":
        return Path(unquote(urlsplit(text).path))
    if scheme in ("http", "https"):
        raise ValueError(f"{text!r} is on the network; download the file and give its path")
    return root / text
