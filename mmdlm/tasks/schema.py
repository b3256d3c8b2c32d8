"""Parser of the supported subset of JSON Schema, in which every value has a slot of fixed size.

Any generated text can be parsed as a value of the schema. Keywords for which this cannot be
guaranteed are rejected.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

NONE = "<none>"
"""Text for an unknown value; repetitions are allowed."""
STRING = 16  # default tokens of a string, as in Eric2i/dLLM-CtrlGen: scaffolding/s3.py
NUMBER = 8  # default tokens of a number without bounds
MAX_NUMBER = 64  # upper limit of the tokens of a number
MAX_CHOICES = 64  # integer ranges up to this size are choices rather than digits
NOTES = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$comment", "$defs", "definitions"),
}
KEYWORDS = {
    "string": {"maxLength", "minLength"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set(),
    "null": set(),
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
SIZE = "x-tokens"
# A JSON string up to its closing quote, and the valid escapes.
BODY = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)
ESCAPE = re.compile(r'\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt])')


@dataclass(frozen=True)
class Text:
    """A string.

    Args:
        size: tokens of its slot.
        limit: maximum number of characters; None for no limit.
        nullable: the value may be null.
    """

    size: int
    limit: int | None = None
    nullable: bool = False

    def read(self, written: str) -> str | None:
        """String at the start of JSON text after an opening quote; None for an unknown value."""
        body = ESCAPE.sub(lambda found: json.loads(f'"{found[0]}"'), BODY.match(written)[0])
        # An unpaired surrogate cannot be encoded as UTF-8; it is replaced.
        body = body.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        value = body.replace(NONE, "").strip()[: self.limit].rstrip()
        if not value and NONE in body:
            return None if self.nullable else ""
        return value


@dataclass(frozen=True)
class Number:
    """A number.

    Args:
        size: tokens of its slot.
        is_whole: True for an integer.
        low: minimum; None for no limit.
        high: maximum; None for no limit.
        nullable: the value may be null.
    """

    size: int
    is_whole: bool = False
    low: float | None = None
    high: float | None = None
    nullable: bool = False

    def read(self, written: str) -> float | None:
        """First number in a text, clamped to the limits; None if there is none."""
        digits = r"-?\d+" if self.is_whole else r"-?(?:\d+(?:\.\d+)?|\.\d+)"
        match = re.search(digits, written[: 4 * MAX_NUMBER], re.ASCII)
        if match is None:
            return None if self.nullable else self.nearest(0)
        return self.nearest(int(match[0]) if "." not in match[0] else float(match[0]))

    def nearest(self, value: float) -> float:
        """Value clamped to the limits."""
        value = value if self.low is None else max(value, self.low)
        return value if self.high is None else min(value, self.high)


@dataclass(frozen=True)
class Pick:
    """A choice among JSON literals."""

    literals: tuple[str, ...]


@dataclass(frozen=True)
class Fixed:
    """A constant JSON literal."""

    literal: str


@dataclass(frozen=True)
class Array:
    """A list with slots for `most` items, of which at least `least` are kept."""

    item: Text | Number | Pick | Fixed | Array
    least: int
    most: int


@dataclass(frozen=True)
class Object:
    """An object with named values, in order."""

    properties: tuple[tuple[str, Node], ...]


Node = Text | Number | Pick | Fixed | Array | Object


def parse(schema: Mapping[str, Any], slot: int = STRING) -> Object:
    """Parse a JSON schema.

    Supported are objects of strings, numbers, integers, booleans, enum, const, objects, and arrays
    of scalars or arrays with `maxItems`. Each may be nullable (`anyOf` or a list of types), and
    `$ref` may point into `$defs`. The number of tokens of a value is `x-tokens`, else `maxLength`
    or the number of digits of an integer's bounds, else `slot` (8 for numbers). All properties are
    generated, required or not.

    Args:
        schema: schema as from `json.load` or pydantic's `model_json_schema()`.
        slot: number of tokens of a string whose schema gives no size.
    Raises:
        TypeError: the schema is not a dict.
        ValueError: the schema uses an unsupported keyword, or contradicts itself.
    """
    if not isinstance(schema, Mapping):
        raise TypeError(f"schema is a {type(schema).__name__}, expected a dict (a JSON schema)")
    if isinstance(slot, bool) or not isinstance(slot, int) or slot < 1:
        raise ValueError(f"slot is {slot!r}, expected an integer number of tokens, at least 1")
    root = _Parser(schema, slot).node(schema, "schema", ())
    if not isinstance(root, Object):
        raise ValueError(
            "schema does not describe an object; put the value into an object's properties"
        )
    return root


class _Parser:
    """Recursive parser of one schema."""

    def __init__(self, schema: Mapping[str, Any], slot: int) -> None:
        self.schema, self.slot = schema, slot

    def node(self, given: Any, path: str, refs: tuple[str, ...]) -> Node:
        """Parsed subschema; `refs` are the references followed so far."""
        if not isinstance(given, Mapping):
            raise ValueError(f"{path} is {given!r}, expected a dict")
        if "$ref" in given:
            _check(given, path, {"$ref"})
            return self.node(*self.target(given["$ref"], path, refs))
        if "anyOf" in given:
            return self.either(given, path, refs)
        if "const" in given or "enum" in given:
            return _enum(given, path)
        kind = given.get("type")
        if kind is None and "properties" in given:
            kind = "object"
        if isinstance(kind, list):
            parts = [given | {"type": one} if one != "null" else {"type": one} for one in kind]
            rest = {name: value for name, value in given.items() if name in NOTES}
            return self.either(rest | {"anyOf": parts}, path, refs)
        if kind not in KEYWORDS:
            raise ValueError(f"{path} has type {kind!r}, expected one of {', '.join(KEYWORDS)}")
        sized = {SIZE} if kind in ("string", "integer", "number") else set()
        _check(given, path, {"type", *KEYWORDS[kind], *sized})
        return getattr(self, kind)(given, path, refs)

    def target(self, ref: Any, path: str, refs: tuple[str, ...]) -> tuple[Any, str, tuple]:
        """Target of a reference."""
        if ref in refs:
            raise ValueError(
                f"{path} refers to itself through {ref!r}; recursive schemas are not supported"
            )
        found: Any = self.schema
        for name in str(ref).removeprefix("#/").split("/"):
            name = name.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        if found is None or not str(ref).startswith("#/"):
            raise ValueError(f"{path} refers to {ref!r}, which is not in the schema")
        return found, path, (*refs, ref)

    def either(self, given: Mapping[str, Any], path: str, refs: tuple[str, ...]) -> Node:
        """Parsed `anyOf` of one subschema and null."""
        _check(given, path, {"anyOf"})
        parts = given["anyOf"] if isinstance(given["anyOf"], list) else []
        full = [part for part in parts if part != {"type": "null"}]
        if len(full) != 1:
            raise ValueError(f"{path}.anyOf has {len(full)} types besides null, expected one")
        node = self.node(full[0], path, refs)
        if len(full) == len(parts) or isinstance(node, Array | Object):
            return node  # always generated
        if isinstance(node, Text | Number):
            return replace(node, nullable=True)
        own = (node.literal,) if isinstance(node, Fixed) else node.literals
        return Pick(tuple(dict.fromkeys((*own, "null"))))

    def string(self, given: Mapping[str, Any], path: str, refs: tuple[str, ...]) -> Node:
        """Parsed string; with maxLength 0 a constant."""
        if _count(given, "minLength", path):
            raise ValueError(f"{path}.minLength is not supported; remove it and check the result")
        limit = _count(given, "maxLength", path)
        if limit == 0:
            return Fixed('""')
        return Text(_count(given, SIZE, path, 1) or limit or self.slot, limit)

    def integer(self, given: Mapping[str, Any], path: str, refs: tuple[str, ...]) -> Node:
        """Parsed integer; a choice if its range is small."""
        low, high = _limits(given, path)
        low = None if low is None else math.ceil(low)
        high = None if high is None else math.floor(high)
        return self.bounded(given, path, Number(NUMBER, True, low, high))

    def number(self, given: Mapping[str, Any], path: str, refs: tuple[str, ...]) -> Node:
        """Parsed number."""
        return self.bounded(given, path, Number(NUMBER, False, *_limits(given, path)))

    def bounded(self, given: Mapping[str, Any], path: str, node: Number) -> Node:
        """Number with its slot size."""
        low, high, own = node.low, node.high, _count(given, SIZE, path, 1)
        closed = low is not None and high is not None
        if closed and low > high:
            raise ValueError(f"{path} has no value between {low} and {high}")
        if own is not None and own > MAX_NUMBER:
            raise ValueError(f"{path}.{SIZE} is {own}, expected at most {MAX_NUMBER}")
        if closed and node.is_whole and own is None:
            if high - low < MAX_CHOICES:
                return _pick(map(str, range(low, high + 1)))
            own = min(MAX_NUMBER, max(len(str(low)), len(str(high))))
        return replace(node, size=own or NUMBER)

    def boolean(self, given: Mapping[str, Any], path: str, refs: tuple[str, ...]) -> Node:
        """Parsed boolean: a choice of true and false."""
        return Pick(("true", "false"))

    def null(self, given: Mapping[str, Any], path: str, refs: tuple[str, ...]) -> Node:
        """Parsed null: a constant."""
        return Fixed("null")

    def array(self, given: Mapping[str, Any], path: str, refs: tuple[str, ...]) -> Node:
        """Parsed list with a slot for every item."""
        most, least = _count(given, "maxItems", path), _count(given, "minItems", path) or 0
        if most is None:
            raise ValueError(f"{path} has no maxItems, which is required to reserve the slots")
        if least > most:
            raise ValueError(f"{path} has minItems {least}, expected at most maxItems ({most})")
        item = self.node(given.get("items"), f"{path}.items", refs)
        if isinstance(item, Object):
            raise ValueError(
                f"{path}.items is an object, expected strings, numbers, choices or lists"
            )
        return Array(item, least, most) if most else Fixed("[]")

    def object(self, given: Mapping[str, Any], path: str, refs: tuple[str, ...]) -> Node:
        """Parsed object."""
        properties = given.get("properties", {})
        missing = sorted(set(given.get("required", ())) - set(properties))
        if missing:
            raise ValueError(f"{path} requires {missing}, which its properties do not describe")
        if not properties:
            return Fixed("{}") if path != "schema" else Object(())
        parts = properties.items()
        return Object(tuple((n, self.node(part, f"{path}.{n}", refs)) for n, part in parts))


def _check(given: Mapping[str, Any], path: str, known: set[str]) -> None:
    """Raises ValueError for an unsupported keyword."""
    wrong = sorted(set(given) - known - NOTES)
    if wrong:
        raise ValueError(
            f"{path} has {wrong[0]!r}, which is not supported; expected only "
            f"{', '.join(sorted(known))}; remove it and check the result yourself"
        )


def _count(given: Mapping[str, Any], name: str, path: str, least: int = 0) -> int | None:
    """Non-negative integer value of a keyword; None without it."""
    value = given.get(name)
    if value is not None and not (is_a(value, "integer") and value >= least):
        raise ValueError(f"{path}.{name} is {value!r}, expected an integer, at least {least}")
    return None if value is None else int(value)


def _limits(given: Mapping[str, Any], path: str) -> tuple[float | None, float | None]:
    """(minimum, maximum)."""
    is_whole = given["type"] == "integer"
    for name in KEYWORDS["number"] & set(given):
        if not is_a(given[name], "number") or not math.isfinite(given[name]):
            raise ValueError(f"{path}.{name} is {given[name]!r}, expected a number")
    low, high = given.get("minimum"), given.get("maximum")
    if "exclusiveMinimum" in given:
        bound = given["exclusiveMinimum"]
        above = math.floor(bound) + 1 if is_whole else math.nextafter(bound, math.inf)
        low = above if low is None else max(low, above)
    if "exclusiveMaximum" in given:
        bound = given["exclusiveMaximum"]
        below = math.ceil(bound) - 1 if is_whole else math.nextafter(bound, -math.inf)
        high = below if high is None else min(high, below)
    return low, high


def _enum(given: Mapping[str, Any], path: str) -> Node:
    """Parsed `enum` or `const`, without the values that `type` excludes."""
    _check(given, path, {"type", "enum" if "enum" in given else "const"})
    values = given["enum"] if "enum" in given else [given["const"]]
    kinds = given.get("type", list(KEYWORDS))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    fits = [value for value in values if any(is_a(value, kind) for kind in kinds)]
    if not fits:
        raise ValueError(
            f"{path} has no value of type {' or '.join(map(str, kinds))} in {values!r}"
        )
    return _pick(json.dumps(value, ensure_ascii=False, allow_nan=False) for value in fits)


def _pick(literals: Items[str]) -> Pick | Fixed:
    """A choice, or a constant if there is only one literal."""
    found = tuple(dict.fromkeys(literals))
    return Pick(found) if len(found) > 1 else Fixed(found[0])


def is_a(value: Any, kind: str) -> bool:
    """Whether a value is of a JSON type; 1.0 is an integer, True is not a number."""
    if kind in ("integer", "number"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (kind == "number" or value % 1 == 0)
    kinds = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": Mapping}
    return isinstance(value, kinds[kind])
