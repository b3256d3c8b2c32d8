"""Schema scaffolding: generate JSON that conforms to a schema.

The structure of the JSON text (braces, names, commas) is written to the canvas beforehand. The
model fills in the slots of the values, and `mmdlm.tasks.schema` parses them.

Source: Self-adaptive Schema Scaffolding, Eric2i/dLLM-CtrlGen: scaffolding/schema.py. There, all
values are strings; numbers, choices, lists and nested objects are our extension.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmdlm.decoding.guidance.allowed import Allowed, Choice, Slot
from mmdlm.decoding.guidance.suppress import Suppress
from mmdlm.decoding.strategy import Strategy
from mmdlm.messages import Example, Media, assistant, user
from mmdlm.messages import Slot as Place
from mmdlm.model import MultimodalDLM
from mmdlm.processor import Processor
from mmdlm.tasks.generate import Answer, end_ids, fill, masked_canvas
from mmdlm.tasks.scaffold_values import read, write
from mmdlm.tasks.schema import NONE, STRING, Array, Fixed, Node, Number, Object, Pick, Text, parse
from mmdlm.text import Tokenizer

INDENT = "  "
DIGITS = tuple(
    f"{i:0{n}}" for n in (1, 2, 3) for i in range(10**n)
)  # number tokens of common tokenizers
LISTED = 10  # changed values that a warning names
SPACES = (" ", "\n", "  ")  # allowed between a value and the following comma


@dataclass(frozen=True)
class Scaffold:
    """Canvas of a schema.

    Args:
        root: parsed schema.
        tokens: int64 [G], mask ids in the slots.
        slots: positions and allowed tokens of each slot, in canvas order.
    """

    root: Object
    tokens: Tensor
    slots: tuple[Slot | Choice, ...]

    def read(self, tokenizer: Tokenizer, tokens: Items[int]) -> tuple[dict[str, Any], list[str]]:
        """Parse a filled canvas.

        Args:
            tokenizer: tokenizer of the model.
            tokens: at least G ids, with any ids in the slots.
        Returns:
            the object, and a note for each value that was changed to conform to the schema.
        """
        notes: list[str] = []
        filled = iter([(slot, list(tokens[slot.start : slot.stop])) for slot in self.slots])
        return read(self.root, filled, tokenizer, "", notes), notes

    @property
    def is_known(self) -> Tensor:
        """[G] bool, False in the slots."""
        known = torch.ones_like(self.tokens, dtype=torch.bool)
        for slot in self.slots:
            known[slot.start : slot.stop] = False
        return known

    def filled(self, tokenizer: Tokenizer, value: Mapping[str, Any]) -> Tensor:
        """The canvas that holds a value, int64 [G]; `read` returns the value.

        Args:
            tokenizer: tokenizer of the model.
            value: conforms to the schema.
        Raises:
            ValueError: it does not conform, or a text or number is longer than its slot.
        """
        tokens = self.tokens.clone()
        slots = iter(self.slots)
        for slot, ids in write(self.root, value, slots, tokenizer):
            tokens[slot.start : slot.stop] = torch.tensor(ids)
        return tokens


@dataclass(frozen=True)
class Form:
    """One object to generate.

    Args:
        schema: see `mmdlm.tasks.schema.parse`.
        prompt: instruction.
        media: media before the instruction.
    """

    schema: Mapping[str, Any]
    prompt: str | None
    media: tuple[Media, ...] = ()


def complete(
    model: MultimodalDLM,
    forms: Items[Form],
    strategies: Items[Strategy],
    *,
    slot: int = STRING,
    fence: bool = True,
    length: int | None = None,
    default: int | None = None,
    batch_size: int = 16,
    seed: int | None = None,
) -> list[Answer]:
    """JSON text of each form, in order; forms with equal schemas share batches.

    Args:
        model: model.
        forms: objects to generate.
        strategies: see `mmdlm.decode`.
        slot: see `scaffold`.
        fence: see `scaffold`.
        length: canvas length in tokens, padded with end tokens; None: `default`, or the length of
            the scaffold if that is larger.
        default: the checkpoint's canvas length.
        batch_size: see `mmdlm.tasks.generate.fill`.
        seed: see `mmdlm.tasks.generate.fill`.
    Raises:
        ValueError: a scaffold is longer than `length`, a form has neither prompt nor media, or see
            `scaffold`.
    """
    groups: dict[str, list[int]] = {}
    for i, form in enumerate(forms):
        if form.prompt is None and not form.media:
            raise ValueError("a schema needs an instruction or an image; pass prompt='...'")
        groups.setdefault(json.dumps(form.schema, default=str), []).append(i)
    answers: dict[int, Answer] = {}
    notes: list[str] = []
    no_end = Suppress(ids=sorted(end_ids(model)))
    for group in groups.values():
        made = scaffold(model, forms[group[0]].schema, slot, fence)
        canvas = _pad(model, made.tokens, length, default)
        examples = [_example(forms[i], canvas) for i in group]
        constrained = [*strategies, no_end, Allowed(made.slots)]
        filled = fill(model, examples, constrained, batch_size=batch_size, seed=seed)
        for i, one in zip(group, filled, strict=True):
            value, changed = made.read(model.tokenizer, one.tokens)
            text = json.dumps(value, indent=2, ensure_ascii=False)
            answers[i] = one.answer(model, text, len(made.tokens))
            notes += changed
    if notes:
        listed, more = "; ".join(notes[:LISTED]), len(notes) - LISTED
        listed += f"; and {more} more" if more > 0 else ""
        warnings.warn(f"values were changed to fit the schema: {listed}", stacklevel=3)
    return [answers[i] for i in range(len(forms))]


def _example(form: Form, canvas: Tensor) -> Example:
    """Example of a form."""
    prompt = () if form.prompt is None else (form.prompt,)
    return Example((user(*form.media, *prompt), assistant(Place(value=canvas))))


def _pad(model: MultimodalDLM, tokens: Tensor, length: int | None, default: int | None) -> Tensor:
    """Canvas padded with end tokens, int64 [length]."""
    size = len(tokens)
    if length is not None and size > length:
        raise ValueError(
            f"length is {length}, but the schema takes {size} tokens; pass a larger one"
        )
    rest = torch.full((max(0, (length or default or 0) - size),), model.spec.eos_id)
    return torch.cat([tokens, rest])


def scaffold(
    model: MultimodalDLM | Processor,
    schema: Mapping[str, Any],
    slot: int = STRING,
    fence: bool = True,
) -> Scaffold:
    """Canvas of a JSON schema; the lines of an object are tokenized separately.

    Args:
        model: model with a tokenizer, or its processor.
        schema: see `mmdlm.tasks.schema.parse`.
        slot: number of tokens of a string whose schema gives no size.
        fence: write the object in a Markdown code fence, as chat models do.
    Raises:
        ValueError: see `parse`; or a text of the schema contains the mask token, or the vocabulary
            cannot represent JSON.
    """
    root = parse(schema, slot)
    builder = _Builder(model if isinstance(model, Processor) else model.processor)
    for piece in pieces(root, fence):
        builder.add(piece)
    return Scaffold(root, torch.cat(builder.parts), tuple(builder.slots))


def instruction(schema: Mapping[str, Any], text: str = "") -> str:
    """Prompt that lists the properties of a schema and requests `<none>` for unknown values.

    Args:
        schema: see `mmdlm.tasks.schema.parse`; descriptions of its properties are included.
        text: text from which the values are to be extracted.
    """
    given = schema.get("properties", {})
    descriptions = {name: given[name].get("description") for name, _ in parse(schema).properties}
    lines = [f"- {name}: {about}" if about else f"- {name}" for name, about in descriptions.items()]
    listed = "\n".join(lines)
    prompt = (
        f"Answer with one JSON object of these values and nothing else:\n{listed}\n"
        f"Where a value is not known, write {NONE} in its place, as often as there is room."
    )
    return f"{prompt}\n\n{text}" if text else prompt


@dataclass(frozen=True)
class Leaf:
    """A value with a slot.

    Args:
        node: its schema.
        before: text before it, on its line.
        after: text after it.
        optional: it may be null.
    """

    node: Text | Number | Pick
    before: str
    after: str
    optional: bool

    @property
    def is_quoted(self) -> bool:
        """The value is a string in any case, so its opening quote is known."""
        if isinstance(self.node, Text):
            return True
        return isinstance(self.node, Pick) and all(o.startswith('"') for o in self.options)

    @property
    def options(self) -> tuple[str, ...]:
        """Literals of a choice."""
        literals = self.node.literals
        return literals if not self.optional or "null" in literals else (*literals, "null")


def pieces(root: Object, fence: bool) -> Iterator[str | Leaf]:
    """Texts and values of a scaffold in order; each text is tokenized separately.

    Args:
        root: parsed schema.
        fence: see `scaffold`.
    """
    if fence:
        yield "```json\n"
    yield from _pieces(root, "", "", "", False)
    if fence:
        yield "\n```"


def _pieces(
    node: Node, indent: str, before: str, after: str, optional: bool
) -> Iterator[str | Leaf]:
    """Pieces of one value.

    Args:
        node: parsed schema of the value.
        indent: indentation of its line.
        before: text before it, on its line.
        after: text after it.
        optional: the value may be null.
    """
    if isinstance(node, Fixed):
        yield before + node.literal + after
    elif isinstance(node, Array):
        for i in range(node.most):
            head, last = (before + "[") if i == 0 else "", i == node.most - 1
            tail = f"]{after}" if last else ", "
            yield from _pieces(node.item, indent, head, tail, i >= node.least)
    elif isinstance(node, Object):
        yield before + "{\n"
        inner = indent + INDENT
        for i, (name, part) in enumerate(node.properties, 1):
            head = f"{inner}{json.dumps(name, ensure_ascii=False)}: "
            tail = "\n" if i == len(node.properties) else ",\n"
            yield from _pieces(part, inner, head, tail, False)
        yield f"{indent}}}{after}"
    else:
        yield Leaf(node, before, after, optional)


class _Builder:
    """Builds a canvas from texts and slots.

    Args:
        processor: of a model with a tokenizer.
    """

    def __init__(self, processor: Processor) -> None:
        tokenizer = processor.tokenizer
        if tokenizer is not None and tokenizer.words is not None:
            raise ValueError(
                f"the vocabulary of this model has only {len(tokenizer.words)} words and cannot "
                "represent JSON; use a text model (--model), or a text with [MASK]"
            )
        self.processor = processor
        self.parts: list[Tensor] = []
        self.slots: list[Slot | Choice] = []
        self.rest = _space(processor)

    @property
    def size(self) -> int:
        """Number of tokens so far."""
        return sum(map(len, self.parts))

    def text(self, text: str) -> None:
        """Appends a known text."""
        self.parts.append(_encode(self.processor, text))

    def slot(self, slot: Slot | Choice) -> None:
        """Appends a slot."""
        self.slots.append(slot)
        self.parts.append(masked_canvas(self.processor, slot.stop - slot.start))

    def add(self, piece: str | Leaf) -> None:
        """Appends a text, or a value with the text around it."""
        if isinstance(piece, str):
            self.text(piece)
            return
        node, tokenizer = piece.node, self.processor.tokenizer
        quote = piece.is_quoted
        self.text(piece.before + '"' * quote)
        if isinstance(node, Text):
            ends = _quotes(tokenizer)
            self.slot(Slot(self.size, self.size + node.size, rest=self.rest, ends=ends))
        elif isinstance(node, Number):
            optional = piece.optional or node.nullable
            self.slot(_number(node, tokenizer, self.size, self.rest, optional))
        else:
            texts = [literal[quote:] for literal in piece.options]
            options = [_encode(self.processor, text).tolist() for text in texts]
            bare = [_encode(self.processor, text.removesuffix('"')).tolist() for text in texts]
            # Where all options have the same number of tokens, the closing quote is known too.
            quote = quote and len(set(map(len, bare))) == 1 and len(bare[0]) > 0
            self.slot(Choice(self.size, bare if quote else options, self.rest))
        self.text('"' * quote + piece.after)


def _number(node: Number, tokenizer: Tokenizer, start: int, rest: int, optional: bool) -> Slot:
    """Slot of a number: digits, optionally with sign and decimal point, then white space."""
    digits = _ids(tokenizer, DIGITS)
    body = digits if node.is_whole else [*digits, *_ids(tokenizer, (".",))]
    sign = _ids(tokenizer, ("-",)) if node.low is None or node.low < 0 else []
    if not digits:
        raise ValueError("the tokenizer has no token for a digit; use a schema without numbers")
    return Slot(start, start + node.size, body, [*digits, *sign], rest, [rest], optional)


def _ids(tokenizer: Tokenizer, texts: Items[str]) -> list[int]:
    """Ids of those texts that are tokens."""
    ids = (tokenizer.id(text) for text in texts)
    return [i for i in ids if i is not None]


@lru_cache(maxsize=4)
def _quotes(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of tokens that end a JSON string: those with an unescaped quote."""
    vocab = tokenizer.backend.get_vocab()
    return tuple(sorted(i for text, i in vocab.items() if '"' in text.replace('\\"', "")))


def _space(processor: Processor) -> int:
    """Id of a white-space token, which JSON allows around values."""
    encoded = [processor.encode(text).tolist() for text in SPACES]
    ids = next((ids for ids in encoded if len(ids) == 1), None)
    if ids is None:
        raise ValueError("the tokenizer has no token for a space or a line break; JSON needs one")
    return ids[0]


def _encode(processor: Processor, text: str) -> Tensor:
    """Token ids [n] of a text of the schema; special tokens in it are encoded as plain text."""
    processor.encode(text)  # raises ValueError if the text contains the mask token
    ids = torch.tensor(processor.tokenizer.encode(text, special=False), dtype=torch.long)
    if (ids == processor.spec.mask_id).any():
        raise ValueError(f"text {text!r} of the schema contains the mask token; rename it")
    return ids
