"""Conversations: messages of text, media and answer slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROLES = ("system", "developer", "user", "assistant", "tool")
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
CONVERSATION = f"expected {{'role': one of {', '.join(ROLES)}, 'content': text or parts}}"


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
        known: bool [length], tokens of the answer that are given in use: training neither masks nor
            learns them. None: none of them. Only with ids as `value`.
    """

    output: str = "text"
    length: int | None = None
    value: Any = None
    known: Tensor | None = None


Part = Text | Media | Slot


@dataclass(frozen=True, eq=False)
class Message:
    """One message of a conversation.

    Args:
        role: "system", "developer", "user", "assistant", "tool" or "raw".
        parts: parts in order; slots only in a last message with role "assistant".
        extra: further keys of the message for the chat template, such as "name", "tool_call_id" or
            "tool_calls": text, numbers, lists and dicts.
    """

    role: str
    parts: tuple[Part, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if self.role not in (*ROLES, RAW):
            raise ValueError(f"role is {self.role!r}, expected one of {', '.join(ROLES)}")

    @property
    def text(self) -> str:
        """Text of the message, without media and token ids."""
        texts = (part.text for part in self.parts if isinstance(part, Text))
        return "".join(text for text in texts if isinstance(text, str))

    @property
    def strings(self) -> list[str]:
        """The text, and all strings in `extra`: everything that a chat template may write."""
        return [self.text, *_strings(self.extra)]


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
    """Messages, with adjacent messages of the same role merged; those with `extra` stay."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last and last.role == message.role and not (last.extra or message.extra):
            merged[-1] = Message(message.role, (*merged[-1].parts, *message.parts))
        else:
            merged.append(message)
    return tuple(merged)


def is_conversation(given: Any) -> bool:
    """True for one conversation, False for a text or a list of conversations."""
    return isinstance(given, Example) or (
        isinstance(given, list | tuple)
        and len(given) > 0
        and all(isinstance(one, Mapping | Message) or _is_object(one) for one in given)
    )


def conversation(given: Any) -> tuple[Message, ...]:
    """Messages of a conversation given as text, dicts or `Message` objects.

    Args:
        given: a text, which becomes a user message; or messages as `Message` or as
            `{"role": ..., "content": text or list of parts}`, where a part is
            `{"type": "text", "text": ...}`, `{"type": "image", "image": path or image}`,
            `{"type": "image_url", "image_url": {"url": ...}}` or `{"type": "audio", "audio": ...}`.
            Other keys reach the chat template, except those that are None. A last message of the
            assistant is the beginning of the answer, which is continued. Objects of the OpenAI
            client (with `model_dump`) are read as their dicts.
    Raises:
        TypeError: a message is not of this form.
        ValueError: there are no messages, or a role or type is unknown.
    """
    if isinstance(given, str):
        return (user(given),)
    if isinstance(given, Example):
        return given.messages
    messages = tuple(_message(one, i) for i, one in enumerate(given))
    if not messages:
        raise ValueError("the conversation is empty, expected at least one message")
    return messages


def number_error(error: Exception, number: int) -> None:
    """Writes the index of an item, counted from 0, before the message of our own errors."""
    if type(error) in (TypeError, ValueError):
        error.args = (f"item {number}: {error}",)


def numbered(make: Callable[[Any], Any], items: Items[Any]) -> list[Any]:
    """What a function makes of each item; an error gives the index of its item, if of several."""
    made = []
    for i, item in enumerate(items):
        try:
            made.append(make(item))
        except Exception as error:
            if len(items) > 1:
                number_error(error, i)
            raise
    return made


def _is_object(given: Any) -> bool:
    """True for a message object of the OpenAI client."""
    return not isinstance(given, type) and callable(getattr(given, "model_dump", None))


def _message(given: Any, number: int) -> Message:
    if isinstance(given, Message):
        return given
    given = given.model_dump() if _is_object(given) else given
    if not isinstance(given, Mapping) or "role" not in given:
        raise TypeError(f"message {number} is {given!r}, {CONVERSATION}")
    # As in transformers: OpenAI's clients send None for what a message does not have.
    keys = {key: value for key, value in given.items() if value is not None}
    role = keys.pop("role", None)
    content = keys.pop("content", () if keys else None)
    if role not in (*ROLES, RAW) or not isinstance(content, str | list | tuple):
        raise ValueError(
            f"message {number} has role {role!r} and a content of type {type(content).__name__}; "
            f"expected one of {', '.join(ROLES)}, and text or a list of parts"
        )
    extra = {key: _plain(value, f"message {number}, key {key!r}") for key, value in keys.items()}
    parts = [content] if isinstance(content, str) else content
    return Message(role, tuple(_part(one, number) for one in parts), extra)


def _plain(value: Any, name: str) -> Any:
    """The value as text, numbers, lists and dicts; templates must not get objects with methods."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one, name) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, name) for one in value]
    if value is None or type(value) in (str, bool, int, float):
        return value
    raise TypeError(f"{name} holds a {type(value).__name__}, expected text, numbers, lists, dicts")


def _strings(value: Any) -> list[str]:
    """All strings in nested lists and dicts, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for one in pair for text in _strings(one)]
    return [text for one in value for text in _strings(one)] if isinstance(value, list) else []


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


def check_ids(ids: Tensor, vocab: int, name: str) -> None:
    """Checks that token ids are rows of the embedding, before they reach it.

    On a GPU an id outside of the embedding ends the process.

    Args:
        ids: integers of any shape.
        vocab: rows of the embedding.
        name: what holds the ids, for the error.
    Raises:
        TypeError: the ids are not integers.
        ValueError: an id is negative or too large; the error names it and its position.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} holds {ids.dtype}, expected token ids (int64)")
    outside = (ids < 0) | (ids >= vocab)
    if bool(outside.any()):
        at = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name} holds the id {int(ids[tuple(at)])} at position {at}, expected 0 to "
            f"{vocab - 1}, the rows of this model's embedding; encode the text with the tokenizer "
            "of this checkpoint (-100 marks labels, it is not a token)"
        )
