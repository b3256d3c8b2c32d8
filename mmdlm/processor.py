"""Processor: convert conversations to token ids and preprocessed media, without weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from encoders.features import Prepared
from mmdlm.chat import PLAIN, Template, encode, find
from mmdlm.layout import Part, Row, Turn
from mmdlm.media import read_audio, read_image
from mmdlm.messages import RAW, Example, Media, Message, Slot, Text, conversation, number_error
from mmdlm.text import Tokenizer, joined

if TYPE_CHECKING:
    from adapters.codec import Codec
    from mmdlm.backbones.family import Spec

READERS: dict[str, Callable[..., Any]] = {"image": read_image, "audio": read_audio}
NOTHING = torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True)
class Packed:
    """A batch of examples before encoding.

    Args:
        rows: prompts and canvases, with preprocessed media. An example with branches is one row
            with cascade attention and no chat template, else one row per branch.
        example: index of the example of each row.
        branch: index of the first branch of each row.
    """

    rows: tuple[Row, ...]
    example: tuple[int, ...]
    branch: tuple[int, ...]

    @property
    def prompts(self) -> tuple[Row, ...]:
        """The rows without canvases."""
        return tuple(row.without_answers() for row in self.rows)

    @property
    def canvas(self) -> Tensor:
        """Canvases [B G] int64; every row needs one, and all need equal length."""
        return torch.stack([row.turns[0].answer for row in self.rows])


class Processor:
    """Tokenizer, chat template, preprocessing and answer codecs of a model; picklable.

    All checks against prompt injection are made here: a prompt never contains the mask token, and
    control tokens only come from the chat template.

    Args:
        spec: special ids and attention of the model.
        tokenizer: None for checkpoints without one; prompts are token ids then.
        inputs: preprocessing of each modality, see `encoders.encoder.Encoder.preprocess`.
        outputs: codec of each kind of answer other than "text".
        template: prompt template; None for the chat template of the family.
        on_damage: "error" rejects damaged media files; "warn" uses their readable part.
    """

    def __init__(
        self,
        spec: Spec,
        tokenizer: Tokenizer | None = None,
        inputs: Mapping[str, Callable[[Any], Prepared]] | None = None,
        outputs: Mapping[str, Codec] | None = None,
        template: Template | None = None,
        on_damage: Literal["error", "warn"] = "error",
    ) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        self.inputs, self.outputs = dict(inputs or {}), dict(outputs or {})
        self.template = template or Template()
        self.on_damage = on_damage

    # -- media

    def require(self, kind: str) -> None:
        """Raises ValueError if the model has no encoder for this modality."""
        if kind not in self.inputs:
            raise ValueError(
                f"this model takes {', '.join(self.inputs) or 'text only'}, not {kind}; "
                "use a checkpoint with that encoder"
            )

    def prepare(self, kind: str, item: Any, several: bool = False) -> Prepared:
        """Read, check and preprocess one raw item.

        Args:
            kind: "image", "audio" or "state".
            item: see `mmdlm.messages.Media`; a `Prepared` of this kind is returned unchanged.
            several: the prompt has more than one item of this modality. An input may define an
                attribute `several` with the preprocessing for this case (LaViDa tiles a single
                image, but pads each of several images).
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
            item = READERS[kind](item, on_damage=self.on_damage)
        preprocess = self.inputs[kind]
        return (getattr(preprocess, "several", preprocess) if several else preprocess)(item)

    # -- text

    def encode(self, text: str, *, special: bool = True) -> Tensor:
        """Token ids [n] of a text, without a template; `special` as in `Tokenizer.encode`.

        Raises:
            ValueError: there is no tokenizer, the text contains the mask token, or a word is not in
                the vocabulary.
        """
        ids = torch.tensor(self._tokenizer().encode(text, special=special), dtype=torch.long)
        if (ids == self.spec.mask_id).any():
            raise ValueError(f"text {text!r} holds the mask token; in infill() write [MASK]")
        return ids

    def prompt(self, given: Any, *, chat: bool | None = None) -> tuple[Tensor | Media, ...]:
        """Token ids and media of a prompt, up to the start of the answer.

        Args:
            given: a text or a conversation, see `mmdlm.messages.conversation`.
            chat: True: a text is a user message, and a chat template is required; False: a text is
                encoded without a template; None: the chat template is used if there is one.
                Several messages need a template.
        Raises:
            ValueError: the checkpoint has no tokenizer or chat template, a text contains the mask
                token, or the conversation is not valid.
        """
        messages = tuple(conversation(given))
        for text in (text for message in messages for text in message.strings):
            joined(text)  # half of a surrogate pair is named by its place in the message
        if any(message.role == RAW for message in messages):
            return self._raw(messages, {})
        jinja = self.jinja
        if chat is None:
            chat = jinja is not None or len(messages) > 1
        if not chat:
            if len(messages) > 1:
                raise ValueError(
                    "chat is False, but the prompt has several messages; expected one text"
                )
            return self._raw(messages, self.template.media)
        if self.template.system is not None and messages[0].role not in ("system", "developer"):
            messages = (Message("system", (Text(self.template.system),)), *messages)
        messages = self.template.ordered(messages)
        parts = encode(self._tokenizer(), messages, jinja, self.template.media, self.spec.family)
        strings = [text for message in messages for text in message.strings]
        written = [i for text in strings for i in self._tokenizer().encode(text)]
        self._check(parts, written, messages)
        first = [p for p in parts if isinstance(p, Media) and p.kind in self.template.first]
        return (*first, *(part for part in parts if not any(part is medium for medium in first)))

    def _raw(
        self, messages: Items[Message], around: Mapping[str, str]
    ) -> tuple[Tensor | Media, ...]:
        """Parts without a chat template, with the text around media; adjacent texts are joined."""
        parts: list[Tensor | Media] = []
        text = ""

        def flush() -> None:
            nonlocal text
            if text:
                parts.append(torch.tensor(self._tokenizer().encode(text), dtype=torch.long))
            text = ""

        for part in (part for message in messages for part in message.parts):
            if isinstance(part, Text) and isinstance(part.text, str):
                text += part.text
            elif isinstance(part, Text):
                flush()
                parts.append(torch.as_tensor(part.text, dtype=torch.long))
            elif isinstance(part, Media):
                before, after = around.get(part.kind, "{}").split("{}")
                text += before
                flush()
                parts.append(part)
                text = after
            else:
                raise TypeError("a prompt contains a slot, expected slots only in the last message")
        flush()
        given = [m for m in messages if m.text]
        self._check(parts, [], given or messages)
        return tuple(part for part in parts if isinstance(part, Media) or len(part))

    def _check(
        self, parts: Items[Tensor | Media], written: Items[int], messages: Items[Message]
    ) -> None:
        """Raises ValueError if a prompt contains the mask token (prompt injection)."""
        ids = {i for part in parts if isinstance(part, Tensor) for i in part.tolist()}
        if self.spec.mask_id in ids or self.spec.mask_id in written:
            text = messages[0].text if len(messages) == 1 else [m.text for m in messages]
            raise ValueError(
                f"prompt {text!r} holds the mask token; remove it, or use infill() for templates"
            )

    @property
    def jinja(self) -> str | None:
        """Chat template (Jinja text); None if prompts are encoded without one."""
        chat = self.template.chat or self.spec.template
        if chat == PLAIN and (self.tokenizer is None or self.tokenizer.template is None):
            return None
        return find(self.tokenizer, chat)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "this checkpoint has neither tokenizer.json nor vocab.json with merges.txt; use "
                "token ids (decode)"
            )
        return self.tokenizer

    # -- answers

    def canvas(self, messages: Items[Message]) -> Tensor:
        """Canvas [G] int64 of a conversation: its last message, if that is the assistant's.

        Text is encoded; a slot becomes masks, or its value padded with end tokens.

        Raises:
            TypeError: the message contains media.
            ValueError: an answer is longer than its slot, or a slot has no length.
        """
        if not messages or messages[-1].role != "assistant":
            return NOTHING
        parts = [self._place(part) for part in messages[-1].parts]
        return torch.cat(parts) if parts else NOTHING

    def _place(self, part: Text | Media | Slot) -> Tensor:
        if isinstance(part, Text):
            return self.encode(part.text) if isinstance(part.text, str) else part.text
        if isinstance(part, Media):
            raise TypeError("the answer contains media, expected them only in user messages")
        codec = self.outputs.get(part.output)
        if codec is None and part.output != "text":
            known = ", ".join(("text", *self.outputs))
            raise ValueError(
                f"output is {part.output!r}, expected one of {known}; see the model's statistics"
            )
        if isinstance(part.value, Tensor):
            return part.value
        length = part.length if part.length is not None else codec and codec.length
        if not length:
            raise ValueError(f"a slot for {part.output} has no length, expected at least 1")
        if part.value is None:
            if self.spec.mask_id is None:
                raise self.spec.unknown_mask()
            return torch.full((length,), self.spec.mask_id)
        if codec is None:
            ids = torch.tensor(self._tokenizer().encode(part.value), dtype=torch.long)
        else:
            ids = codec.encode(part.value)
        if len(ids) > length:
            raise ValueError(
                f"answer {part.value!r} has {len(ids)} tokens, but its slot only {length}"
            )
        return torch.cat([ids, torch.full((length - len(ids),), self.spec.eos_id)])

    # -- batches

    def pack(
        self, examples: Items[Example], media: MediaCache | None = None, *, chat: bool | None = None
    ) -> Packed:
        """Convert examples to rows of token ids, preprocessed media and canvases.

        Args:
            examples: at least one example.
            media: cache of media, so that no item is read twice; None: an empty cache.
            chat: see `prompt`.
        Raises:
            ValueError: an example is not valid; message or note give its index among several.
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
        """One row with all branches if attention allows it, else one row per conversation."""
        is_raw = self.jinja is None and self.template.system is None
        if example.branches and self.spec.attention == "cascade" and is_raw:
            shared = self._parts(example.messages, media, chat)
            turns = tuple(self._turn(branch, media, chat) for branch in example.branches)
            return [Row(shared, turns)]
        turns = [self._turn(messages, media, chat) for messages in example.conversations]
        if not all(turn.prompt or len(turn.answer) for turn in turns):
            raise ValueError("there is neither media nor text, expected a prompt")
        return [Row((), (Turn(turn.prompt or self._opening(), turn.answer),)) for turn in turns]

    def _opening(self) -> tuple[Tensor, ...]:
        """What an answer without a prompt follows: BOS; in a shifted family without it, the end."""
        names = {} if self.tokenizer is None else self.tokenizer.names
        start = self.tokenizer.id(names["bos_token"]) if "bos_token" in names else None
        if start is None and self.spec.shift:  # it predicts the first token from the one before
            start = self.spec.eos_id
        return () if start is None else (torch.tensor([start]),)

    def _turn(self, messages: Items[Message], media: MediaCache, chat: bool | None) -> Turn:
        prompt = messages[:-1] if messages and messages[-1].role == "assistant" else messages
        return Turn(self._parts(prompt, media, chat), self.canvas(messages))

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
    """Cache of the preprocessed and encoded media of one call.

    Args:
        examples: all examples of the call; an item is kept until its last use was packed.
    """

    examples: Items[Example] = ()
    uses: Counter[Hashable] = field(default_factory=Counter)
    prepared: dict[Hashable, Prepared] = field(default_factory=dict)
    embeddings: dict[Hashable, Tensor] = field(default_factory=dict)
    numbers: Items[int] = ()
    """Indices of the current batch's examples, for error messages."""
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
        """Preprocessed item, from the cache if it was read before."""
        key = _identity(part)
        prepared = self.prepared.get((key, several))
        if prepared is None:
            self.failed = part.kind
            prepared = processor.prepare(part.kind, part.item, several)
            self.failed = ""
        self.uses[key] -= 1
        if self.uses[key] > 0:
            self.prepared[key, several] = prepared
        else:
            self.prepared.pop((key, several), None)
        return prepared

    def explain(self, error: Exception, number: int) -> None:
        """Adds the index of the example to an error; as a note, if one of its media failed."""
        number = self.numbers[number] if self.numbers else number
        if self.failed:
            error.add_note(f"This is the {self.failed} of item {number}, counted from 0.")
        elif len(self.examples) > 1:
            number_error(error, number)
        self.failed = ""

    def forget(self) -> None:
        """Removes the embeddings of media that no later example uses."""
        needed = {item.digest for item in self.prepared.values()}
        self.embeddings = {k: v for k, v in self.embeddings.items() if k in needed}


def _identity(part: Media) -> Hashable:
    """Cache key of a raw item by path or object; the examples keep the objects alive."""
    item = part.item
    return part.kind, (str(item) if isinstance(item, str | Path) else id(item))
