"""What a person asks as what a model takes: token ids and preprocessed media, no weights."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from encoders.features import Prepared
from mmdlm.chat import Template, encode, find
from mmdlm.layout import Part, Row, Turn
from mmdlm.media import read_audio, read_image
from mmdlm.messages import RAW, Example, Media, Message, Slot, Text, conversation, user
from mmdlm.text import Tokenizer

if TYPE_CHECKING:
    from adapters.codec import Codec
    from mmdlm.backbones.family import Spec

READERS: dict[str, Callable[[Any], Any]] = {"image": read_image, "audio": read_audio}
NOTHING = torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True)
class Packed:
    """Examples before the encoders ran.

    Args:
        rows: prompts and canvases; media are preprocessed items. An example with branches is one
            row under cascade attention without a chat template, else one row per branch.
        example: index of the example each row comes from.
        branch: index of the branch each row begins with.
    """

    rows: tuple[Row, ...]
    example: tuple[int, ...]
    branch: tuple[int, ...]

    @property
    def prompts(self) -> tuple[Row, ...]:
        """The rows without their canvases."""
        return tuple(row.without_answers() for row in self.rows)

    @property
    def canvas(self) -> Tensor:
        """[B G] int64, the canvases of rows that have one of equal length each."""
        return torch.stack([row.turns[0].answer for row in self.rows])


class Processor:
    """Tokenizer, chat template, preprocessing and answer codecs of a model; it can be pickled.

    Texts are checked here and nowhere else: a prompt never contains the mask token, and in a chat
    template only the template writes control tokens.

    Args:
        spec: special ids and attention of the model.
        tokenizer: None for checkpoints without one; then prompts are token ids.
        inputs: by modality, raw item to `Prepared`; see `encoders.encoder.Encoder.preprocess`.
        outputs: by kind of answer besides "text", the codec between values and token ids.
        template: how prompts are written; None for the chat template of the family.
    """

    def __init__(
        self,
        spec: Spec,
        tokenizer: Tokenizer | None = None,
        inputs: Mapping[str, Callable[[Any], Prepared]] | None = None,
        outputs: Mapping[str, Codec] | None = None,
        template: Template | None = None,
    ) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        self.inputs, self.outputs = dict(inputs or {}), dict(outputs or {})
        self.template = template or Template()

    # -- media

    def require(self, kind: str) -> None:
        """Raises ValueError unless the model takes this modality."""
        if kind not in self.inputs:
            raise ValueError(
                f"this model takes {', '.join(self.inputs) or 'text only'}, not {kind}; "
                "use a checkpoint with that encoder"
            )

    def prepare(self, kind: str, item: Any, several: bool = False) -> Prepared:
        """One raw item, read, checked and preprocessed.

        Args:
            kind: "image", "audio" or "state".
            item: see `mmdlm.messages.Media`; a `Prepared` of this kind is returned as it is.
            several: the prompt holds more than one item of this modality. An input may have
                another way for these under its attribute `several` (LaViDa cuts one image into
                tiles, but pads each of several).
        Raises:
            ValueError: the model has no such encoder, or the item is not valid.
        """
        if isinstance(item, Prepared):
            if item.kind != kind:
                raise ValueError(f"expected {kind}, got a preprocessed {item.kind}")
            return item
        self.require(kind)
        if kind == "state" and "actions" in self.outputs:
            item = self.outputs["actions"].normalize_state(item)
        elif kind in READERS:
            item = READERS[kind](item)
        chosen = self.inputs[kind]
        return (getattr(chosen, "several", chosen) if several else chosen)(item)

    # -- text

    def encode(self, text: str) -> Tensor:
        """Token ids [n] of a text as it stands, without a template.

        Raises:
            ValueError: there is no tokenizer, the text contains the mask token, or the vocabulary
                lacks a word of it.
        """
        ids = torch.tensor(self._tokenizer().encode(text), dtype=torch.long)
        if (ids == self.spec.mask_id).any():
            raise ValueError(f"text {text!r} holds the mask token; in infill() write [MASK]")
        return ids

    def prompt(self, given: Any, *, chat: bool | None = None) -> tuple[Tensor | Media, ...]:
        """Token ids and media of a prompt, up to where the answer begins.

        Args:
            given: a text or a conversation, see `mmdlm.messages.conversation`.
            chat: True: a text is what the user says, and there must be a chat template; False: it
                is taken as it is. None: the chat template is used where there is one, which
                several messages need.
        Raises:
            ValueError: the checkpoint lacks the tokenizer or the chat template it takes, a text
                contains the mask token, or the conversation is not valid.
        """
        messages = (user(given),) if isinstance(given, str) else tuple(conversation(given))
        if any(message.role == RAW for message in messages):
            return self._raw(messages, {})
        jinja = self.jinja
        if chat is None:
            chat = jinja is not None or len(messages) > 1
        if not chat:
            if len(messages) > 1:
                raise ValueError("chat=False takes a text as it is, not a conversation")
            return self._raw(messages, self.template.media)
        if self.template.system is not None and messages[0].role != "system":
            messages = (Message("system", (Text(self.template.system),)), *messages)
        parts = encode(self._tokenizer(), messages, jinja, self.template.media, self.spec.family)
        read = [i for message in messages for i in self._tokenizer().encode(message.text)]
        self._check(parts, read, messages)
        is_first = [isinstance(part, Media) and part.kind in self.template.first for part in parts]
        first = [part for part, early in zip(parts, is_first, strict=True) if early]
        return (*first, *(part for part, early in zip(parts, is_first, strict=True) if not early))

    def _raw(
        self, messages: Items[Message], around: Mapping[str, str]
    ) -> tuple[Tensor | Media, ...]:
        """The parts as they are, with the text around media; neighbouring texts go together."""
        found: list[Tensor | Media] = []
        text = ""

        def flush() -> None:
            nonlocal text
            if text:
                found.append(torch.tensor(self._tokenizer().encode(text), dtype=torch.long))
            text = ""

        for part in (part for message in messages for part in message.parts):
            if isinstance(part, Text) and isinstance(part.text, str):
                text += part.text
            elif isinstance(part, Text):
                flush()
                found.append(torch.as_tensor(part.text, dtype=torch.long))
            elif isinstance(part, Media):
                before, after = around.get(part.kind, "{}").split("{}")
                text += before
                flush()
                found.append(part)
                text = after
            else:
                raise TypeError("a slot stands in the last message, which is the assistant's")
        flush()
        given = [m for m in messages if m.text]
        self._check(found, [], given or messages)
        return tuple(part for part in found if isinstance(part, Media) or len(part))

    def _check(
        self, parts: Items[Tensor | Media], read: Items[int], messages: Items[Message]
    ) -> None:
        """Rejects prompts that contain the mask token, an answer slot smuggled into a prompt."""
        ids = {i for part in parts if isinstance(part, Tensor) for i in part.tolist()}
        if self.spec.mask_id in ids or self.spec.mask_id in read:
            text = messages[0].text if len(messages) == 1 else [m.text for m in messages]
            raise ValueError(
                f"prompt {text!r} holds the mask token; remove it, or use infill() for templates"
            )

    @property
    def jinja(self) -> str | None:
        """The chat template in force (Jinja text); None when prompts are taken as they are."""
        chat = self.template.chat or self.spec.template
        return chat if "{" in chat else find(self.tokenizer, chat)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "this checkpoint holds no tokenizer.json, nor vocab.json with merges.txt; use "
                "token ids (decode)"
            )
        return self.tokenizer

    # -- answers

    def canvas(self, messages: Items[Message]) -> Tensor:
        """The canvas [G] int64 of a conversation: what stands in the assistant's last message.

        Known text keeps its ids, a slot is masks or its value, completed with end tokens.

        Raises:
            ValueError: an answer does not fit its slot, or a slot has no length.
        """
        if not messages or messages[-1].role != "assistant":
            return NOTHING
        parts = [self._place(part) for part in messages[-1].parts]
        return torch.cat(parts) if parts else NOTHING

    def _place(self, part: Text | Media | Slot) -> Tensor:
        if isinstance(part, Text):
            return self.encode(part.text) if isinstance(part.text, str) else part.text
        if isinstance(part, Media):
            raise TypeError("media stand in the messages of users, not on the canvas")
        codec = self.outputs.get(part.output)
        if codec is None and part.output != "text":
            known = ", ".join(("text", *self.outputs))
            raise ValueError(f"this model gives {known}, not {part.output}; see its statistics")
        if isinstance(part.value, Tensor):
            return part.value
        length = part.length if part.length is not None else codec and codec.length
        if not length:
            raise ValueError(f"a slot for {part.output} has no length; give one, 1 or more")
        if part.value is None:
            return torch.full((length,), self.spec.mask_id)
        if codec is None:
            ids = torch.tensor(self._tokenizer().encode(part.value), dtype=torch.long)
        else:
            ids = codec.encode(part.value)
        if len(ids) > length:
            raise ValueError(
                f"answer {part.value!r} has {len(ids)} tokens, its canvas {length}; lengthen it"
            )
        return torch.cat([ids, torch.full((length - len(ids),), self.spec.eos_id)])

    # -- all of it

    def pack(
        self, examples: Items[Example], media: MediaCache | None = None, *, chat: bool | None = None
    ) -> Packed:
        """Examples as rows of token ids, preprocessed media and canvases.

        Args:
            examples: at least one.
            media: what was read before, so that no item is read twice; None: nothing.
            chat: see `prompt`.
        Raises:
            ValueError: an example is not valid; a note of the error says which one.
        """
        media = MediaCache() if media is None else media
        rows: list[Row] = []
        example: list[int] = []
        branch: list[int] = []
        for number, one in enumerate(examples):
            try:
                made = self._rows(one, media, chat)
            except Exception as error:
                media.explain(error, number)
                raise
            rows += made
            example += [number] * len(made)
            branch += range(len(made))
        return Packed(tuple(rows), tuple(example), tuple(branch))

    def _rows(self, example: Example, media: MediaCache, chat: bool | None) -> list[Row]:
        """One row with all branches where attention allows it, else one row per conversation."""
        is_raw = self.jinja is None and self.template.system is None
        if example.branches and self.spec.attention == "cascade" and is_raw:
            shared = self._parts(example.messages, media, chat)
            turns = tuple(self._turn(branch, media, chat) for branch in example.branches)
            return [Row(shared, turns)]
        return [Row((), (self._turn(messages, media, chat),)) for messages in example.conversations]

    def _turn(self, messages: Items[Message], media: MediaCache, chat: bool | None) -> Turn:
        asked = messages[:-1] if messages and messages[-1].role == "assistant" else messages
        return Turn(self._parts(asked, media, chat), self.canvas(messages))

    def _parts(
        self, messages: Items[Message], media: MediaCache, chat: bool | None
    ) -> tuple[Part, ...]:
        if not messages:
            return ()
        parts = self.prompt(tuple(messages), chat=chat)
        count = Counter(part.kind for part in parts if isinstance(part, Media))
        return tuple(
            media.read(self, part, count[part.kind] > 1) if isinstance(part, Media) else part
            for part in parts
        )


@dataclass
class MediaCache:
    """Media of one call, each read, preprocessed and encoded once and kept while it is needed.

    Args:
        examples: all examples of the call; an item that several of them use is kept until the
            last one was packed.
    """

    examples: Items[Example] = ()
    uses: Counter[Hashable] = field(default_factory=Counter)
    prepared: dict[Hashable, Prepared] = field(default_factory=dict)
    embeddings: dict[Hashable, Tensor] = field(default_factory=dict)
    numbers: Items[int] = ()
    """Numbers of the coming batch's examples in the call, for errors."""
    failed: str = ""

    def __post_init__(self) -> None:
        for example in self.examples:
            for messages in (example.messages, *example.branches):
                self.uses.update(
                    _identity(part)
                    for message in messages
                    for part in message.parts
                    if isinstance(part, Media)
                )

    def read(self, processor: Processor, part: Media, several: bool) -> Prepared:
        """The preprocessed item, from the cache where it was read before."""
        key = _identity(part)
        found = self.prepared.get((key, several))
        if found is None:
            self.failed = part.kind
            found = processor.prepare(part.kind, part.item, several)
            self.failed = ""
        self.uses[key] -= 1
        if self.uses[key] > 0:
            self.prepared[key, several] = found
        else:
            self.prepared.pop((key, several), None)
        return found

    def explain(self, error: Exception, number: int) -> None:
        """Adds to an error which example, and which medium of it, it is about."""
        if self.failed:
            number = self.numbers[number] if self.numbers else number
            error.add_note(f"This is the {self.failed} of item {number}, counted from 0.")
        self.failed = ""

    def forget(self) -> None:
        """Drops the embeddings of media that no later example uses."""
        again = {digest(item) for item in self.prepared.values()}
        self.embeddings = {k: v for k, v in self.embeddings.items() if k in again}


def digest(item: Prepared) -> Hashable:
    """What tells two preprocessed items apart by content."""
    data = item.tensor.contiguous().view(torch.uint8).numpy()
    content = hashlib.blake2b(data, digest_size=16).digest()
    return item.kind, content, tuple(item.tensor.shape), item.size, item.grid


def _identity(part: Media) -> Hashable:
    """What tells two items of a call apart without reading them; the examples keep them alive."""
    item = part.item
    return part.kind, (str(item) if isinstance(item, str | Path) else id(item))
