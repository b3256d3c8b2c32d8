"""Conversations from JSON Lines, JSON, CSV or TSV: messages, or prompt and answer columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from mmdlm.data.conversations import Conversations, Row
from mmdlm.data.records import EXTENSIONS, Entry, entries, first
from mmdlm.messages import ITEM_KEYS

PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("query", "response"),
)
"""Columns of prompt and answer in rows without messages, as in data sets for trl and alpaca."""
MEDIA = {"image": "image", "images": "image", "audio": "audio", "audios": "audio"}
"""Columns of media beside the text: kind by name; a value is one file name or a list."""


class Chat(Conversations):
    """Conversations, one per row.

    A row has "messages" in the form of OpenAI and transformers (see
    `mmdlm.messages.conversation`), or one of `PAIRS`. "system" is a system message, "input" is
    appended to "instruction", and `MEDIA` are placed before the first question, or where a text
    holds `<image>` or `<audio>`.

    Args:
        path: `.jsonl`, `.json`, `.csv` or `.tsv`.
        length: see `Conversations`.
        prompt: see `Conversations`.
    """

    EXAMPLE: ClassVar[str] = (
        '{"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, '
        '{"type": "text", "text": "What is it?"}]}, {"role": "assistant", "content": "A cat."}]}\n'
        '{"question": "What is 2 + 2?", "answer": "4"}'
    )

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Conversations.matches`."""
        if path.suffix.lower() not in EXTENSIONS or not path.is_file():
            return False
        row = first(path)
        return "messages" in row or pair(row) is not None

    def entries(self) -> Iterator[Entry]:
        """See `Conversations.entries`."""
        return entries(self.path)

    def row(self, entry: dict[str, Any], place: str) -> Row:
        """See `Conversations.row`."""
        return conversation(entry, place)


def pair(row: Row) -> tuple[str, str] | None:
    """Names of a row's prompt and answer columns; None if it has none of `PAIRS` with texts."""
    return next(
        (names for names in PAIRS if all(isinstance(row.get(name), str) for name in names)), None
    )


def conversation(row: dict[str, Any], place: str) -> Row:
    """A row in the form of `Row`.

    Args:
        row: as in the file.
        place: for errors.

    Raises:
        ValueError: it has neither messages nor one of `PAIRS`.
    """
    names = pair(row)
    if "messages" in row:
        messages = row["messages"]
    elif names is not None:
        question, answer = row[names[0]], row[names[1]]
        if names[0] == "instruction" and row.get("input"):
            question = f"{question}\n{row['input']}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": row["system"]})
    else:
        raise ValueError(
            f"{place} has the keys {', '.join(row) or 'none'}; expected 'messages' or texts in "
            + " or ".join(f"'{q}' and '{a}'" for q, a in PAIRS)
        )
    media = [
        {"type": kind, kind: item}
        for column, kind in MEDIA.items()
        if row.get(column)
        for item in (row[column] if isinstance(row[column], list) else [row[column]])
    ]
    return {"messages": placed(messages, media, place), "group": str(row.get("group", ""))}


def placed(messages: list[Any], media: list[dict[str, Any]], place: str) -> list[Any]:
    """Messages with media at their marks, or before the first question.

    Marks are `<image>` and `<audio>` in a text, and parts of these types without an item.

    Args:
        messages: dicts with role and content.
        media: content parts, in the order of the marks of their kind.
        place: for errors.

    Raises:
        ValueError: there are marks, and not as many as media of the kind.
    """
    if not media:
        return messages
    found = []
    left = list(media)
    marked = any(_marks(m) for m in messages)
    for message in messages:
        content = message["content"]
        if message["role"] == "user" and marked:
            content = _filled(content, left, place)
        elif message["role"] == "user" and left:
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            content, left = [*left, *parts], []
        found.append({**message, "content": content})
    if left:
        raise ValueError(
            f"{place} has {len(media)} media files, but {len(media) - len(left)} marks <image> or "
            "<audio>; use one mark per file, or none"
        )
    return found


def _marks(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return "<image>" in content or "<audio>" in content
    return any(_is_empty(part) for part in content or ())


def _is_empty(part: Any) -> bool:
    """Whether a content part is an image or a clip that is given elsewhere."""
    if not isinstance(part, dict) or part.get("type") not in ("image", "audio"):
        return False
    return all(part.get(key) is None for key in ITEM_KEYS[part["type"]])


def _filled(content: Any, left: list[dict[str, Any]], place: str) -> Any:
    """Content with media at its marks; takes them from `left`."""
    if isinstance(content, str):
        return _spliced(content, left, place) if _marks({"content": content}) else content
    return [_taken(part["type"], left, place) if _is_empty(part) else part for part in content]


def _taken(kind: str, left: list[dict[str, Any]], place: str) -> dict[str, Any]:
    taken = next((part for part in left if part["type"] == kind), None)
    if taken is None:
        raise ValueError(f"{place} has more marks <{kind}> than {kind} files")
    left.remove(taken)
    return taken


def _spliced(text: str, left: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """Content parts of a text with marks; takes its media from `left`."""
    parts: list[dict[str, Any]] = []
    while True:
        at = {kind: text.find(f"<{kind}>") for kind in ("image", "audio")}
        kind = min((k for k in at if at[k] >= 0), key=at.get, default=None)
        if kind is None:
            break
        taken = _taken(kind, left, place)
        if before := text[: at[kind]].removesuffix("\n"):
            parts.append({"type": "text", "text": before})
        parts.append(taken)
        text = text[at[kind] + len(kind) + 2 :].removeprefix("\n")
    return [*parts, *([{"type": "text", "text": text}] if text else [])]
