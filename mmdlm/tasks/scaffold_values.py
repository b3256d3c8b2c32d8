"""Values of a scaffold's slots: token ids to JSON values and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mmdlm.decoding.guidance.allowed import Choice, Slot
from mmdlm.tasks.schema import NONE, Array, Fixed, Node, Number, Object, Pick, Text
from mmdlm.text import Tokenizer


def read(
    node: Node,
    filled: Iterator[tuple[Slot | Choice, list[int]]],
    tokenizer: Tokenizer,
    path: str,
    notes: list[str],
) -> Any:
    """Parsed value of a schema node.

    Args:
        node: parsed schema.
        filled: slots in canvas order, with their token ids.
        tokenizer: tokenizer of the model.
        path: names of the value, for notes.
        notes: gets a note if the value was changed to conform to the schema.
    """
    if isinstance(node, Fixed):
        return json.loads(node.literal)
    if isinstance(node, Object):
        return {
            name: read(part, filled, tokenizer, f"{path}.{name}".lstrip("."), notes)
            for name, part in node.properties
        }
    if isinstance(node, Array):
        return _items(node, filled, tokenizer, path, notes)
    slot, tokens = next(filled)
    if isinstance(node, Text):
        return node.read(tokenizer.decode(tokens))
    if isinstance(node, Pick):
        options = [[*o, *[slot.rest] * (len(tokens) - len(o))] for o in slot.options]
        matches = [sum(a == b for a, b in zip(o, tokens, strict=True)) for o in options]
        best = max(range(len(matches)), key=matches.__getitem__)
        if matches[best] < len(tokens):
            written = tokenizer.decode(tokens)
            notes.append(f"{path} {written!r} to the nearest choice")
        return json.loads(node.literals[best]) if best < len(node.literals) else None
    size = next((i for i, token in enumerate(tokens) if token == slot.rest), len(tokens))
    if slot.optional and not size:
        return None
    # `decode` may put spaces between tokens.
    written = "".join(tokenizer.backend.id_to_token(token) or "" for token in tokens[:size])
    value = node.read(written)
    unbounded = Number(node.size, node.is_whole, nullable=True).read(written)
    if unbounded is None or value != unbounded:
        notes.append(f"{path} {written!r} to {value}")
    return value


def _items(
    node: Array,
    filled: Iterator[tuple[Slot | Choice, list[int]]],
    tokenizer: Tokenizer,
    path: str,
    notes: list[str],
) -> list[Any]:
    """Parsed items of a list; empty items beyond `minItems` are dropped."""
    values = [read(node.item, filled, tokenizer, f"{path}[{i}]", notes) for i in range(node.most)]
    allows_null = isinstance(node.item, Pick | Fixed) and "null" in (
        node.item.literals if isinstance(node.item, Pick) else (node.item.literal,)
    )
    if allows_null:
        return values
    spare = len(values) - node.least
    kept = []
    for value in reversed(values):
        if value in (None, "") and spare > 0:
            spare -= 1
        else:
            kept.append(value)
    return kept[::-1]


def write(
    node: Node, value: Any, slots: Iterator[Slot | Choice], tokenizer: Tokenizer, path: str = ""
) -> Iterator[tuple[Slot | Choice, list[int]]]:
    """Each slot of a value with its token ids, which `read` turns into the value.

    Args:
        node: parsed schema.
        value: conforms to the schema.
        slots: of the scaffold, from the first one of this node.
        tokenizer: tokenizer of the model.
        path: names of the value, for errors.
    Raises:
        ValueError: the value does not conform, or does not fit its slot.
    """
    if isinstance(node, Fixed):
        _require(json.loads(node.literal) == value, path, value, node.literal)
    elif isinstance(node, Object):
        names = [name for name, _ in node.properties]
        fits = isinstance(value, Mapping) and set(value) == set(names)
        _require(fits, path, value, f"an object of {', '.join(names)}")
        for name, part in node.properties:
            yield from write(part, value[name], slots, tokenizer, f"{path}.{name}".lstrip("."))
    elif isinstance(node, Array):
        fits = isinstance(value, list) and node.least <= len(value) <= node.most
        _require(fits, path, value, f"a list of {node.least} to {node.most}")
        for i in range(node.most):
            item = value[i] if i < len(value) else _nothing(node.item)
            yield from write(node.item, item, slots, tokenizer, f"{path}[{i}]")
    else:
        slot = next(slots)
        ids = _ids(node, value, slot, tokenizer, path)
        size = slot.stop - slot.start
        _require(len(ids) <= size, path, value, f"at most {size} tokens; it has {len(ids)}")
        yield slot, ids + [slot.rest] * (size - len(ids))


def _nothing(node: Node) -> Any:
    """Value of an unused item of a list."""
    return "" if isinstance(node, Text) else None


def _ids(
    node: Text | Number | Pick, value: Any, slot: Slot | Choice, tokenizer: Tokenizer, path: str
) -> list[int]:
    """Token ids of a value without the padding of its slot."""
    if isinstance(node, Pick):
        literals = [json.loads(literal) for literal in node.literals]
        literals += [None] * (len(slot.options) - len(literals))
        same = [i for i, one in enumerate(literals) if (one, type(one)) == (value, type(value))]
        _require(bool(same), path, value, f"one of {literals}")
        return list(slot.options[same[0]])
    if isinstance(node, Number):
        if value is None and slot.optional:
            return []
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(is_number and node.nearest(value) == value, path, value, "a number in its limits")
        ids = [tokenizer.id(letter) for letter in str(value)]
        known = {*slot.ids, *(slot.first or ())}
        _require(known.issuperset(ids), path, value, "digits with a sign and a point")
        return ids
    text = NONE if value is None else value
    _require(isinstance(text, str), path, value, "a text")
    ids = tokenizer.encode(json.dumps(text, ensure_ascii=False)[1:-1], special=False)
    full = len(ids) >= slot.stop - slot.start
    return ids if full else [*ids, *tokenizer.encode('"', special=False)]


def _require(fits: bool, path: str, value: Any, expected: str) -> None:
    """Raises ValueError if a value does not fit its schema or slot."""
    if not fits:
        raise ValueError(f"{path or 'the value'} is {value!r}, expected {expected}")
