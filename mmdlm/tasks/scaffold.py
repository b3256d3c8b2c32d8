"""JSON that fits a schema: its structure written beforehand, its values filled in.

The canvas holds all that a schema fixes (braces, names, commas) and a place for every value, so the
model writes nothing but values; `mmdlm.tasks.schema` reads them.

Source: Self-adaptive Schema Scaffolding, Eric2i/dLLM-CtrlGen: scaffolding/schema.py. Its values are
strings; numbers, choices, lists and nested objects are ours.
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
from mmdlm.tasks.generate import Answer, Filled, blank, end_ids, fill, words
from mmdlm.tasks.schema import NONE, STRING, Array, Fixed, Node, Number, Object, Pick, Text, parse
from mmdlm.text import Tokenizer

INDENT = "  "
DIGITS = tuple(f"{i:0{n}}" for n in (1, 2, 3) for i in range(10**n))  # as tokenizers cut numbers
SPACES = (" ", "\n", "  ")  # what may stand between a value and the comma behind it


@dataclass(frozen=True)
class Scaffold:
    """The canvas of a schema.

    Args:
        root: what the schema asks for.
        tokens: int64 [G], the mask id in the places of values.
        slots: what may stand in each place, in the order of the canvas.
    """

    root: Object
    tokens: Tensor
    slots: tuple[Slot | Choice, ...]

    def read(self, tokenizer: Tokenizer, tokens: Items[int]) -> tuple[dict[str, Any], list[str]]:
        """The object that a filled canvas stands for, and what was not taken as it was written.

        Args:
            tokenizer: of the model.
            tokens: G ids or more; those in the places of values may be any.
        """
        notes: list[str] = []
        filled = iter([(slot, list(tokens[slot.start : slot.stop])) for slot in self.slots])
        return _value(self.root, filled, tokenizer, "", notes), notes


@dataclass(frozen=True)
class Form:
    """One object to fill in.

    Args:
        schema: see `mmdlm.tasks.schema.parse`.
        prompt: the text before the object.
        media: what stands before the prompt.
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
    own: int | None = None,
    batch_size: int = 16,
    seed: int | None = None,
) -> list[Answer]:
    """The object of each form as JSON text, in order; forms of one schema share batches.

    Args:
        model: the model.
        forms: what is to be filled in.
        strategies: see `mmdlm.decode`.
        slot: see `scaffold`.
        fence: see `scaffold`.
        length: tokens to which the canvas is completed with end tokens; None: `own`, if larger.
        own: the checkpoint's.
        batch_size: see `mmdlm.tasks.generate.fill`.
        seed: see `mmdlm.tasks.generate.fill`.
    Raises:
        ValueError: see `scaffold`; or a canvas is longer than `length`, or nothing stands before.
    """
    groups: dict[str, list[int]] = {}
    for i, form in enumerate(forms):
        if form.prompt is None and not form.media:
            raise ValueError("a schema says how to answer, not what about; pass prompt='...'")
        groups.setdefault(json.dumps(form.schema, default=str), []).append(i)
    found: dict[int, Answer] = {}
    notes: list[str] = []
    limits = [Suppress(ids=sorted(end_ids(model)))]
    for group in groups.values():
        made = scaffold(model, forms[group[0]].schema, slot, fence)
        canvas = _completed(model, made, length, own)
        examples = [_example(forms[i], canvas) for i in group]
        given = [*strategies, *limits, Allowed(made.slots)]
        filled = fill(model, examples, given, batch_size=batch_size, seed=seed)
        for i, one in zip(group, filled, strict=True):
            found[i], changed = _answer(model, made, one)
            notes += changed
    if notes:
        warnings.warn(
            f"what the model wrote was changed to fit the schema: {'; '.join(notes)}", stacklevel=3
        )
    return [found[i] for i in range(len(forms))]


def _example(form: Form, canvas: Tensor) -> Example:
    """A form with its canvas."""
    prompt = () if form.prompt is None else (form.prompt,)
    return Example((user(*form.media, *prompt), assistant(Place(value=canvas))))


def _completed(model: MultimodalDLM, made: Scaffold, length: int | None, own: int | None) -> Tensor:
    """The canvas of a scaffold, completed with end tokens; int64 [length]."""
    size = len(made.tokens)
    if length is not None and size > length:
        raise ValueError(
            f"the schema takes {size} tokens, the canvas has {length}; pass a larger length"
        )
    rest = torch.full((max(0, (length or own or 0) - size),), model.spec.eos_id)
    return torch.cat([made.tokens, rest])


def _answer(model: MultimodalDLM, made: Scaffold, filled: Filled) -> tuple[Answer, list[str]]:
    """The JSON text that a filled canvas stands for, and what was changed for it."""
    size = len(made.tokens)
    value, changed = made.read(model.tokenizer, filled.tokens)
    answer = Answer(
        json.dumps(value, indent=2, ensure_ascii=False),
        tuple(filled.tokens[:size]),
        filled.forwards,
        filled.seconds,
        tuple(filled.confidence[:size]),
        tuple(filled.step[:size]),
        words(model, filled.tokens[:size], filled.step, filled.confidence),
    )
    return answer, changed


def scaffold(
    model: MultimodalDLM, schema: Mapping[str, Any], slot: int = STRING, fence: bool = True
) -> Scaffold:
    """The canvas of a JSON schema; the lines of an object are tokenised one by one.

    Args:
        model: its tokenizer and mask id.
        schema: see `mmdlm.tasks.schema.parse`.
        slot: tokens of a string whose schema does not say how long it is.
        fence: put the object into a Markdown code fence, as chat models do.
    Raises:
        ValueError: see `parse`; or a text of the schema holds the mask token, or the tokenizer
            cannot spell JSON.
    """
    root, builder = parse(schema, slot), _Builder(model)
    if fence:
        builder.know("```json\n")
    builder.write(root, "", "", "")
    if fence:
        builder.know("\n```")
    return Scaffold(root, torch.cat(builder.parts), tuple(builder.slots))


def instruction(schema: Mapping[str, Any], text: str = "") -> str:
    """A prompt that names the values of a schema and asks for `<none>` where there is none.

    Args:
        schema: see `mmdlm.tasks.schema.parse`; descriptions of its properties are quoted.
        text: what the values are about.
    """
    given = schema.get("properties", {})
    about = {name: given[name].get("description") for name, _ in parse(schema).properties}
    wanted = "\n".join(f"- {n}: {told}" if told else f"- {n}" for n, told in about.items())
    asked = (
        f"Answer with one JSON object of these values and nothing else:\n{wanted}\n"
        f"Where a value is not known, write {NONE} in its place, as often as there is room."
    )
    return f"{asked}\n\n{text}" if text else asked


class _Builder:
    """Writes a canvas piece by piece.

    Args:
        model: its tokenizer and mask id.
    """

    def __init__(self, model: MultimodalDLM) -> None:
        tokenizer = model.tokenizer
        if tokenizer is not None and tokenizer.words is not None:
            raise ValueError(
                f"this model's vocabulary is a list of {len(tokenizer.words)} words and cannot "
                "spell JSON; take a text model (--model), or a text with [MASK]"
            )
        self.model = model
        self.parts: list[Tensor] = []
        self.slots: list[Slot | Choice] = []
        self.rest = _space(model)

    @property
    def size(self) -> int:
        """Tokens so far."""
        return sum(map(len, self.parts))

    def know(self, text: str) -> None:
        """Adds a text that is known."""
        self.parts.append(_spelt(self.model, text))

    def place(self, slot: Slot | Choice) -> None:
        """Adds a place for a value."""
        self.slots.append(slot)
        self.parts.append(blank(self.model, slot.stop - slot.start))

    def write(
        self, node: Node, indent: str, before: str, after: str, optional: bool = False
    ) -> None:
        """Adds a value with what stands around it.

        Args:
            node: the value.
            indent: of the line it is in.
            before: text in front of it, on its line.
            after: text behind it.
            optional: its place may say that there is none.
        """
        at, tokenizer = self.size, self.model.tokenizer
        if isinstance(node, Fixed):
            self.know(before + node.literal + after)
        elif isinstance(node, Text):
            self.know(before + '"')
            ends = _quotes(tokenizer)
            self.place(Slot(self.size, self.size + node.size, rest=self.rest, ends=ends))
            self.know('"' + after)
        elif isinstance(node, Number):
            self.know(before)
            at = self.size
            self.place(_number(node, tokenizer, at, self.rest, optional or node.nullable))
            self.know(after)
        elif isinstance(node, Pick):
            literals = node.literals
            if optional and "null" not in literals:
                literals = (*literals, "null")
            quote = all(literal.startswith('"') for literal in literals)
            self.know(before + '"' * quote)
            options = [_spelt(self.model, text[quote:]).tolist() for text in literals]
            self.place(Choice(self.size, options, self.rest))
            self.know(after)
        elif isinstance(node, Array):
            for i in range(node.most):
                head, last = (before + "[") if i == 0 else "", i == node.most - 1
                self.write(node.item, indent, head, f"]{after}" if last else ", ", i >= node.least)
        else:
            self.know(before + "{\n")
            inner = indent + INDENT
            for i, (name, part) in enumerate(node.properties, 1):
                head = f"{inner}{json.dumps(name, ensure_ascii=False)}: "
                self.write(part, inner, head, "\n" if i == len(node.properties) else ",\n")
            self.know(f"{indent}}}{after}")


def _number(node: Number, tokenizer: Tokenizer, at: int, rest: int, optional: bool) -> Slot:
    """The place of a number: digits, then whatever else."""
    digits = _ids(tokenizer, DIGITS)
    body = digits if node.is_whole else [*digits, *_ids(tokenizer, (".",))]
    sign = _ids(tokenizer, ("-",)) if node.low is None or node.low < 0 else []
    if not digits:
        raise ValueError("the tokenizer has no token for a digit; ask for strings only")
    return Slot(at, at + node.size, body, [*digits, *sign], rest, [rest], optional)


def _ids(tokenizer: Tokenizer, texts: Items[str]) -> list[int]:
    """Ids of the texts that are tokens."""
    found = (tokenizer.id(text) for text in texts)
    return [number for number in found if number is not None]


@lru_cache(maxsize=4)
def _quotes(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a string: those with a quote that is not escaped within them."""
    vocab = tokenizer.backend.get_vocab()
    return tuple(sorted(i for text, i in vocab.items() if '"' in text.replace('\\"', "")))


def _space(model: MultimodalDLM) -> int:
    """A token of white space, which JSON allows around values."""
    found = [model.processor.encode(text).tolist() for text in SPACES]
    ids = next((ids for ids in found if len(ids) == 1), None)
    if ids is None:
        raise ValueError("the tokenizer has no token for a space or a line break; JSON needs one")
    return ids[0]


def _spelt(model: MultimodalDLM, text: str) -> Tensor:
    """Token ids [n] of a text of the schema; special tokens in it are text like any other."""
    model.processor.encode(text)  # refuses the mask token, which may look like text when spelt out
    ids = torch.tensor(model.tokenizer.encode(text, special=False), dtype=torch.long)
    if (ids == model.spec.mask_id).any():
        raise ValueError(f"text {text!r} of the schema holds the mask token; rename it")
    return ids


def _value(
    node: Node,
    filled: Iterator[tuple[Slot | Choice, list[int]]],
    tokenizer: Tokenizer,
    path: str,
    notes: list[str],
) -> Any:
    """The value of a part; adds to `notes` what was not taken as it was written."""
    if isinstance(node, Fixed):
        return json.loads(node.literal)
    if isinstance(node, Object):
        return {
            name: _value(part, filled, tokenizer, f"{path}.{name}".lstrip("."), notes)
            for name, part in node.properties
        }
    if isinstance(node, Array):
        return _items(node, filled, tokenizer, path, notes)
    slot, tokens = next(filled)
    if isinstance(node, Text):
        return node.read(tokenizer.decode(tokens))
    if isinstance(node, Pick):
        places = [[*o, *[slot.rest] * (len(tokens) - len(o))] for o in slot.options]
        fits = [sum(a == b for a, b in zip(place, tokens, strict=True)) for place in places]
        best = max(range(len(fits)), key=fits.__getitem__)
        if fits[best] < len(tokens):
            written = tokenizer.decode(tokens)
            notes.append(f"{path} {written!r} to the nearest choice")
        return json.loads(node.literals[best]) if best < len(node.literals) else None
    size = next((i for i, token in enumerate(tokens) if token == slot.rest), len(tokens))
    if slot.optional and not size:
        return None
    # Not by `decode`, which may put spaces between tokens.
    written = "".join(tokenizer.backend.id_to_token(token) or "" for token in tokens[:size])
    value, said = node.read(written), Number(node.size, node.is_whole, nullable=True).read(written)
    if said is None or value != said:
        notes.append(f"{path} {written!r} to {value}")
    return value


def _items(
    node: Array,
    filled: Iterator[tuple[Slot | Choice, list[int]]],
    tokenizer: Tokenizer,
    path: str,
    notes: list[str],
) -> list[Any]:
    """The items of a list, without those behind the least that say nothing."""
    found = [_value(node.item, filled, tokenizer, f"{path}[{i}]", notes) for i in range(node.most)]
    is_null_said = isinstance(node.item, Pick | Fixed) and "null" in (
        node.item.literals if isinstance(node.item, Pick) else (node.item.literal,)
    )
    if is_null_said:
        return found
    spare = len(found) - node.least
    kept = []
    for value in reversed(found):
        if value in (None, "") and spare > 0:
            spare -= 1
        else:
            kept.append(value)
    return kept[::-1]
