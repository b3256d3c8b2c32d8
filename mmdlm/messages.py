"""What a person writes: messages of text, media and places for answers."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

ROLES = ("system", "user", "assistant")
RAW = "raw"
"""Role of a message whose parts are taken as they are, without a chat template."""
MEDIA = ("image", "audio", "state")
# The keys under which a content part may hold its item, as OpenAI and transformers write them.
ITEM_KEYS = {
    "image": ("image", "path", "url"),
    "image_url": ("image_url",),
    "audio": ("audio", "path", "url"),
    "state": ("state",),
}
CONVERSATION = "expected {'role': 'system', 'user' or 'assistant', 'content': text or parts}"


@dataclass(frozen=True, eq=False)
class Text:
    """Words, or token ids int64 [n] where no tokenizer is wanted."""

    text: str | Tensor


@dataclass(frozen=True, eq=False)
class Media:
    """An image, a clip or a robot state inside a message.

    Args:
        kind: "image", "audio" or "state".
        item: see `mmdlm.media.read_image` and `read_audio`; numbers [S] in robot units for a
            state; or an `encoders.features.Prepared`.
    """

    kind: str
    item: Any


@dataclass(frozen=True, eq=False)
class Slot:
    """A place on the canvas that the model fills in.

    Args:
        output: kind of answer, "text" or "actions".
        length: positions; None for the output's own.
        value: in training, the answer; or int64 ids [length] of which only the masks are filled.
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
        parts: in order; slots only in the last message, which is the assistant's.
    """

    role: str
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if self.role not in (*ROLES, RAW):
            raise ValueError(f"role is {self.role!r}, expected one of {', '.join(ROLES)}")

    @property
    def text(self) -> str:
        """The words of the message; media and ids are left out."""
        texts = (part.text for part in self.parts if isinstance(part, Text))
        return "".join(text for text in texts if isinstance(text, str))


class Turn(NamedTuple):
    """A question, its answer and the length of its canvas in tokens, as data sets hold them."""

    prompt: str
    answer: Any
    length: int | None


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation, the last message of which may hold places to fill in.

    Args:
        messages: the conversation.
        branches: alternative continuations, each answered by itself: several questions about one
            image, which is then encoded once.
        group: name under which scores are averaged (a task, a kind of scene).
        names: words the media show, where known: for an image a tuple of words per token of its
            grid, row-major; for audio the words in the order they are spoken.
    """

    messages: tuple[Message, ...] = ()
    branches: tuple[tuple[Message, ...], ...] = ()
    group: str = ""
    names: tuple[tuple[str, ...], ...] | tuple[str, ...] | None = field(default=None, repr=False)

    @property
    def conversations(self) -> tuple[tuple[Message, ...], ...]:
        """Every conversation of the example, whole: the messages followed by each branch."""
        if not self.branches:
            return (self.messages,)
        return tuple(merge((*self.messages, *branch)) for branch in self.branches)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Question, answer and canvas of each conversation that has an answer."""
        found = []
        for conversation in self.conversations:
            asked = next((m.text for m in reversed(conversation) if m.role == "user"), "")
            for part in conversation[-1].parts:
                if isinstance(part, Slot):
                    found.append(Turn(asked, part.value, part.length))
        return tuple(found)

    def media(self, kind: str) -> list[Any]:
        """The items of one modality in the shared messages, in order."""
        parts = [part for message in self.messages for part in message.parts]
        return [part.item for part in parts if isinstance(part, Media) and part.kind == kind]


def user(*parts: Part | str) -> Message:
    """A user's message; strings are text."""
    return Message("user", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def assistant(*parts: Part | str) -> Message:
    """An assistant's message; strings are text."""
    return Message("assistant", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def merge(messages: Items[Message]) -> tuple[Message, ...]:
    """Messages in which neighbours of one role are one message."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            merged[-1] = Message(message.role, (*merged[-1].parts, *message.parts))
        else:
            merged.append(message)
    return tuple(merged)


def is_conversation(given: Any) -> bool:
    """Whether a value is one conversation rather than a text or a list of several."""
    return isinstance(given, Example) or (
        isinstance(given, list | tuple)
        and len(given) > 0
        and all(isinstance(one, Mapping | Message) for one in given)
    )


def conversation(given: Any) -> tuple[Message, ...]:
    """Messages from what people write.

    Args:
        given: a text, which a user says; or messages as `Message` or as
            `{"role": ..., "content": text or list of parts}`, where a part is
            `{"type": "text", "text": ...}`, `{"type": "image", "image": path or image}`,
            `{"type": "image_url", "image_url": {"url": ...}}` or `{"type": "audio", "audio": ...}`.
    Raises:
        TypeError: a message is not of this form.
        ValueError: there are no messages, a role or type is unknown, or the assistant speaks last.
    """
    if isinstance(given, str):
        return (user(given),)
    if isinstance(given, Example):
        return given.messages
    messages = tuple(_message(one, i) for i, one in enumerate(given))
    if not messages:
        raise ValueError("the conversation is empty; give at least one message")
    if messages[-1].role == "assistant":
        raise ValueError("the conversation ends with the assistant; add what the user says to it")
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
