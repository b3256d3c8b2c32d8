"""Conversations: messages of text, media and answer slots."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

ROLES = ("system", "user", "assistant")
RAW = "raw"
"""Role of a message that is encoded without a chat template."""
MEDIA = ("image", "audio", "state")
# Keys of the item in a content part, as in the formats of OpenAI and transformers.
ITEM_KEYS = {
    "image": ("image", "path", "url"),
    "image_url": ("image_url",),
    "audio": ("audio", "path", "url"),
    "state": ("state",),
}
CONVERSATION = "expected {'role': 'system', 'user' or 'assistant', 'content': text or parts}"


@dataclass(frozen=True, eq=False)
class Text:
    """Text, or token ids int64 [n], which need no tokenizer."""

    text: str | Tensor


@dataclass(frozen=True, eq=False)
class Media:
    """An image, an audio clip or a robot state in a message.

    Args:
        kind: "image", "audio" or "state".
        item: see `mmdlm.media.read_image` and `read_audio`; numbers [S] in robot units for a
            state; or an `encoders.features.Prepared`.
    """

    kind: str
    item: Any


@dataclass(frozen=True, eq=False)
class Slot:
    """Canvas positions that the model fills in.

    Args:
        output: kind of answer, "text" or "actions".
        length: number of positions; None for the default of the output.
        value: the answer, in training; or int64 ids [length] in which only masks are filled in.
    """

    output: str = "text"
    length: int | None = None
    value: Any = None


Part = Text | Media | Slot


@dataclass(frozen=True, eq=False)
class Message:
    """One message of a conversation.

    Args:
        role: "system", "user", "assistant" or "raw".
        parts: parts in order; slots only in a last message with role "assistant".
    """

    role: str
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if self.role not in (*ROLES, RAW):
            raise ValueError(f"role is {self.role!r}, expected one of {', '.join(ROLES)}")

    @property
    def text(self) -> str:
        """Text of the message, without media and token ids."""
        texts = (part.text for part in self.parts if isinstance(part, Text))
        return "".join(text for text in texts if isinstance(text, str))


class Turn(NamedTuple):
    """A question, its answer and its canvas length in tokens, as in data sets."""

    prompt: str
    answer: Any
    length: int | None


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation, with slots in its last message.

    Args:
        messages: conversation.
        branches: alternative continuations, answered independently; for example several questions
            about one image, which is encoded once.
        group: group name for averaging scores (a task, a kind of scene).
        names: ground-truth words of the media, if known: for an image a tuple of words per token
            of its row-major grid; for audio the spoken words in order.
    """

    messages: tuple[Message, ...] = ()
    branches: tuple[tuple[Message, ...], ...] = ()
    group: str = ""
    names: tuple[tuple[str, ...], ...] | tuple[str, ...] | None = field(default=None, repr=False)

    @property
    def conversations(self) -> tuple[tuple[Message, ...], ...]:
        """All complete conversations: the messages followed by each branch."""
        if not self.branches:
            return (self.messages,)
        return tuple(merge((*self.messages, *branch)) for branch in self.branches)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Question, answer and canvas length of each slot."""
        turns = []
        for conversation in self.conversations:
            question = next((m.text for m in reversed(conversation) if m.role == "user"), "")
            for part in conversation[-1].parts:
                if isinstance(part, Slot):
                    turns.append(Turn(question, part.value, part.length))
        return tuple(turns)

    def media(self, kind: str) -> list[Any]:
        """Items of one modality in the shared messages, in order."""
        parts = [part for message in self.messages for part in message.parts]
        return [part.item for part in parts if isinstance(part, Media) and part.kind == kind]


def user(*parts: Part | str) -> Message:
    """User message; strings become text parts."""
    return Message("user", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def assistant(*parts: Part | str) -> Message:
    """Assistant message; strings become text parts."""
    return Message("assistant", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def merge(messages: Items[Message]) -> tuple[Message, ...]:
    """Messages, with adjacent messages of the same role merged."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            merged[-1] = Message(message.role, (*merged[-1].parts, *message.parts))
        else:
            merged.append(message)
    return tuple(merged)


def is_conversation(given: Any) -> bool:
    """True for one conversation, False for a text or a list of conversations."""
    return isinstance(given, Example) or (
        isinstance(given, list | tuple)
        and len(given) > 0
        and all(isinstance(one, Mapping | Message) for one in given)
    )


def conversation(given: Any) -> tuple[Message, ...]:
    """Messages of a conversation given as text, dicts or `Message` objects.

    Args:
        given: a text, which becomes a user message; or messages as `Message` or as
            `{"role": ..., "content": text or list of parts}`, where a part is
            `{"type": "text", "text": ...}`, `{"type": "image", "image": path or image}`,
            `{"type": "image_url", "image_url": {"url": ...}}` or `{"type": "audio", "audio": ...}`.
    Raises:
        TypeError: a message is not of this form.
        ValueError: there are no messages, a role or type is unknown, or the assistant's message is
            the last one.
    """
    if isinstance(given, str):
        return (user(given),)
    if isinstance(given, Example):
        return given.messages
    messages = tuple(_message(one, i) for i, one in enumerate(given))
    if not messages:
        raise ValueError("the conversation is empty, expected at least one message")
    if messages[-1].role == "assistant":
        raise ValueError("the conversation ends with the assistant; add a user message")
    return messages


def _message(given: Any, number: int) -> Message:
    if isinstance(given, Message):
        return given
    if not isinstance(given, Mapping) or set(given) != {"role", "content"}:
        raise TypeError(f"message {number} is {given!r}, {CONVERSATION}")
    role, content = given["role"], given["content"]
    if role not in (*ROLES, RAW) or not isinstance(content, str | list | tuple):
        raise ValueError(
            f"message {number} has role {role!r} and a content of type {type(content).__name__}; "
            f"expected one of {', '.join(ROLES)}, and text or a list of parts"
        )
    if isinstance(content, str):
        return Message(role, (Text(content),))
    return Message(role, tuple(_part(one, number) for one in content))


def _part(given: Any, number: int) -> Part:
    if isinstance(given, Text | Media | Slot):
        return given
    if isinstance(given, str):
        return Text(given)
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text" and isinstance(given.get("text"), str):
        return Text(given["text"])
    for key in ITEM_KEYS.get(kind, ()):
        if given.get(key) is not None:
            item = given[key]
            if isinstance(item, Mapping):  # OpenAI: {"url": ...}
                item = item.get("url")
            return Media(kind.removesuffix("_url"), item)
    raise ValueError(
        f"message {number} holds the part {given!r}; expected {{'type': 'text', 'text': ...}}, "
        "{'type': 'image', 'image': ...} or {'type': 'audio', 'audio': ...}"
    )
