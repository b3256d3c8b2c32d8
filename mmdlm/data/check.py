"""Every problem of every row of a data set, found before training."""

from __future__ import annotations

import re
import time
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tqdm import tqdm

from encoders.features import Prepared
from mmdlm.data.conversations import Conversations, Row, answers
from mmdlm.data.dataset import Preset
from mmdlm.messages import RAW, Media, Message, conversation
from mmdlm.processor import READERS, Processor

MARK = re.compile(
    r"<[|/]?(?:image|img|picture|video|audio|sound|speech|vision|media)[\w|-]*>", re.IGNORECASE
)
"""Marks of media in texts of other data formats and models."""
FOLLOWS = {
    "": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant", "user"),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
"""Roles that may follow a role; "" is the start."""
BAR = {"leave": False, "disable": None, "delay": 1}
"""Settings of a progress bar: only in a terminal, and only if it takes longer than a second."""
BATCH = 64  # media handed to the threads at a time
Signature = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Kind, shape, size and grid of a preprocessed item, which determine its number of tokens."""


@dataclass(frozen=True)
class Problem:
    """Something that would end a training run or spoil it.

    Args:
        place: file and line.
        kind: what all problems of this sort have in common.
        text: what is wrong.
    """

    place: str
    kind: str
    text: str

    @classmethod
    def of(cls, place: str, kind: str, error: Exception | str) -> Problem:
        """A problem from an error, whose message may begin with the place."""
        text = " ".join([str(error), *getattr(error, "__notes__", [])])
        text = " ".join(text.removeprefix(place).lstrip(":, ").split())
        return cls(place, kind, text or type(error).__name__)

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}: {self.text}"


@dataclass
class Checked:
    """Result of a check.

    Args:
        rows: number of rows, those with problems included.
        problems: in the order of the rows.
        notes: what is worth knowing and not wrong.
        media: number of different items by kind.
        opened: how many of them were opened.
        lengths: tokens of each answer.
        canvas: tokens of the canvas; 0 if unknown.
    """

    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    media: Counter[str] = field(default_factory=Counter)
    opened: int = 0
    lengths: array[int] = field(default_factory=lambda: array("l"))
    canvas: int = 0

    def add(self, other: Checked) -> None:
        """Adds what another check found."""
        self.rows += other.rows
        self.problems += other.problems
        self.notes += other.notes
        self.media += other.media
        self.opened += other.opened
        self.lengths.extend(other.lengths)
        self.canvas = max(self.canvas, other.canvas)


def not_valid(rejected: Items[tuple[str, Exception]]) -> list[Problem]:
    """The problems of rows that could not be read, see `conversations.collecting`."""
    found = dict.fromkeys(Problem.of(place, "not valid", error) for place, error in rejected)
    return list(found)


def check(
    data: Conversations,
    processor: Processor,
    preset: Preset | None = None,
    media: bool = True,
    seconds: float | None = None,
    count: Callable[[Signature], int] | None = None,
) -> Checked:
    """Checks all texts of a data set, and its media as far as the time allows.

    Args:
        data: its rows; it is connected, see `Dataset.connect`.
        processor: of the model that is trained; its vocabulary has the words of the data.
        preset: the model's defaults per task.
        media: also open and preprocess the images and clips, as training does.
        seconds: time for the media; None: all are opened.
        count: tokens of a preprocessed item; None: 0.
    """
    found = Checked(len(data), media=Counter())
    by_row: list[tuple[int, str, str]] = []
    if processor.tokenizer is None:
        text = "the model has no tokenizer, which texts need"
        return Checked(len(data), [Problem(str(data.path), "no tokenizer", text)])
    for i, row in enumerate(_shown(data.rows, "answers")):
        for kind, text in _answers(row, data.length, processor, found.lengths):
            by_row.append((i, kind, text))
    data.longest = 1 + max(found.lengths, default=0)
    data.connect(processor, preset)
    found.canvas = data.length
    opened = _media(data, processor, media, seconds, found)
    tokens = _counted(opened, count, found.notes)
    for i, row in enumerate(_shown(data.rows, "texts")):
        keys = _keys(row)
        for key in dict.fromkeys(keys):
            if isinstance(opened.get(key), Problem):
                by_row.append((i, opened[key].kind, opened[key].text))
        messages = data.messages(row)
        wrong = [*_roles(messages), *_marks(messages), *_masks(messages, processor)]
        if not wrong:
            media_tokens = sum(tokens.get(key, 0) for key in keys)
            wrong += _prompts(data, processor, messages, media_tokens)
        by_row += [(i, kind, text) for kind, text in wrong]
    by_row.sort(key=lambda one: one[0])
    found.problems += [Problem(data.places[i], kind, text) for i, kind, text in by_row]
    return found


def _shown(rows: Items[Any], what: str) -> Iterator[Any]:
    """The rows, with a progress bar in a terminal."""
    return iter(tqdm(rows, desc=what, **BAR))


# -- texts


def _answers(
    row: Row, length: int | None, processor: Processor, lengths: array[int]
) -> Iterator[tuple[str, str]]:
    """Problems of a row's answers; appends their lengths in tokens."""
    for answer in answers(row):
        if not answer.strip():
            yield "empty answer", "there is nothing to learn; write an answer or remove the row"
            continue
        if problem := _mask(answer, processor):
            yield problem
            continue
        try:
            size = len(processor.encode(answer))
        except ValueError as error:
            yield "text", str(error)
            continue
        lengths.append(size)
        if length is not None and size > length:
            yield (
                "answer too long",
                f"answer {short(answer)} has {size} tokens, but the canvas {length}; give a "
                "larger length (--length), or shorten it",
            )


def _mask(text: str, processor: Processor) -> tuple[str, str] | None:
    """The problem of a text that holds the mask token."""
    number = processor.spec.mask_id
    token = None if number is None else processor.tokenizer.backend.id_to_token(number)
    if not token or token not in text:
        return None
    return "mask token", f"{short(text)} holds {token!r}, the mask token; remove it"


def _masks(messages: Items[Message], processor: Processor) -> Iterator[tuple[str, str]]:
    """Prompts that hold the mask token."""
    found = (_mask(m.text, processor) for m in messages if m.role != "assistant")
    return (one for one in found if one is not None)


def _roles(messages: Items[Message]) -> Iterator[tuple[str, str]]:
    """Problems of the order of roles."""
    roles = [message.role for message in messages]
    if RAW in roles:
        return
    for i, (before, role) in enumerate(zip(["", *roles], roles, strict=False)):
        if role not in FOLLOWS[before]:
            where = f"after {before!r}" if before else "at the start"
            expected = " or ".join(FOLLOWS[before])
            yield "roles", f"message {i} has role {role!r} {where}, expected {expected}"
    if roles[-1] != "assistant":
        yield "roles", f"the last message has role {roles[-1]!r} and no answer after it"


def _marks(messages: Items[Message]) -> Iterator[tuple[str, str]]:
    """Marks of media that are left in prompts as text."""
    for i, message in enumerate(messages):
        if message.role != "assistant":
            for mark in dict.fromkeys(MARK.findall(message.text)):
                yield (
                    "unknown mark",
                    f"message {i} holds {mark} as text; write <image> or <audio> and give the file "
                    "in the row, or remove it",
                )


def _prompts(
    data: Conversations, processor: Processor, messages: Items[Message], media: int
) -> Iterator[tuple[str, str]]:
    """Problems of the prompts as the model gets them.

    Args:
        data: connected.
        processor: of the model.
        messages: of one row.
        media: tokens of the row's media.
    """
    branches = list(data.branches(messages))
    # With a chat template the last prompt holds all others.
    for branch in branches if data.stands_alone else branches[-1:]:
        try:
            parts = processor.prompt(branch[:-1]) if branch[:-1] else ()
        except (ValueError, TypeError) as error:
            yield "text", str(error)
            continue
        text = sum(len(part) for part in parts if not isinstance(part, Media))
        try:
            processor.spec.fits(text + media + data.length)
        except ValueError as error:
            yield "too long", str(error)


def short(text: str) -> str:
    """A text as it is quoted in messages."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


# -- media


def _keys(row: Row) -> list[tuple[str, Hashable, bool]]:
    """(kind, item, whether there are several) of each of a row's media."""
    items = [p for m in conversation(row["messages"]) for p in m.parts if isinstance(p, Media)]
    counts = Counter(item.kind for item in items)
    return [(p.kind, Handle.of(p.item), counts[p.kind] > 1) for p in items]


@dataclass(frozen=True)
class Handle:
    """An item that is not hashable, compared as an object."""

    number: int
    item: Any = field(compare=False)

    @classmethod
    def of(cls, item: Any) -> Hashable:
        """The item itself if it is hashable, else its handle."""
        return item if isinstance(item, Hashable) else cls(id(item), item)


def _media(
    data: Conversations, processor: Processor, wanted: bool, seconds: float | None, found: Checked
) -> dict[Hashable, Signature | Problem]:
    """Signature or problem of each different item that was opened."""
    different = dict.fromkeys(key for row in data.rows for key in _keys(row))
    found.media.update(kind for kind, _, _ in different)
    for kind in sorted({kind for kind, _, _ in different} - set(processor.inputs)):
        takes = ", ".join(processor.inputs) or "text only"
        text = f"the rows have {kind}, but the model takes {takes}; use a model with that encoder"
        found.problems.append(Problem(str(data.path), "no encoder", text))
    if not wanted or not different:
        return {}

    def opened(key: tuple[str, Hashable, bool]) -> Signature | Problem:
        kind, item, several = key
        item = item.item if isinstance(item, Handle) else item
        try:
            item = data.item(item)
            if kind not in processor.inputs:
                READERS[kind](item)
                return (kind, (), (), ())
            return signature(processor.prepare(kind, item, several))
        except FileNotFoundError as error:
            return Problem.of("", "missing file", error)
        except Exception as error:  # noqa: BLE001 - any error here would end the training
            return Problem.of("", f"unreadable {kind}", error)

    results: dict[Hashable, Signature | Problem] = {}
    end = None if seconds is None else time.monotonic() + seconds
    left = iter(different)
    with (
        warnings.catch_warnings(record=True) as said,
        ThreadPoolExecutor() as pool,
        tqdm(total=len(different), desc="media", **BAR) as bar,
    ):
        warnings.simplefilter("always")
        while (end is None or time.monotonic() < end) and (some := list(islice(left, BATCH))):
            results.update(zip(some, pool.map(opened, some), strict=True))
            bar.update(len(some))
    found.opened = len(results)
    found.notes += dict.fromkeys(str(one.message) for one in said)
    if len(results) < len(different):
        found.notes.append(
            f"{len(results)} of {len(different)} media were opened in {seconds:g} s; mmdlm data "
            "check, or --check all, opens all of them"
        )
    return results


def _counted(
    opened: Mapping[Hashable, Signature | Problem],
    count: Callable[[Signature], int] | None,
    notes: list[str],
) -> dict[Hashable, int]:
    """Tokens of each item that could be opened; none if they do not matter."""
    tokens: dict[Hashable, int] = {}
    for key, one in opened.items() if count else ():
        if isinstance(one, Problem):
            continue
        try:
            tokens[key] = count(one)
        except (NotImplementedError, RuntimeError) as error:
            notes.append(f"the tokens of {one[0]} could not be counted ({error})")
            return {}
    return tokens


def signature(item: Prepared) -> Signature:
    """What determines the number of tokens of a preprocessed item."""
    return item.kind, tuple(item.tensor.shape), item.size, item.grid
