"""Jinja's sandbox with bounds on steps, time and size.

A chat template comes with a checkpoint and is untrusted. Jinja keeps it from Python's internals;
the `Meter` here bounds what it computes. Every loop round, call, filter and operation is a step.
No result may be larger than a bound, which is checked before a function that could exceed it runs.
"""

from __future__ import annotations

import functools
import numbers
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmdlm.files import weigh

if TYPE_CHECKING:
    from jinja2.compiler import Frame

LONGEST = 2**16
"""Characters of a template; published ones have up to 20,000."""
STEPS, SECONDS = 500_000, 1.0
"""Most loop rounds, calls and operations of one rendering, and its CPU time."""
CHARACTERS = 2**22
"""Most characters of any text a template makes; more where the conversation itself is long."""
UNIT = 16  # characters that count as much as a value in a list
TOTAL = 32  # all intermediate results together, in units of the largest one
WIDTH, BITS = 10_000, 2**14  # largest padding, largest integer
# For HTML. Their time grows with the square of the text.
ABSENT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# Functions whose result can be much larger than their arguments.
PADDING = frozenset(
    ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice", "to_bytes")
    + ("truncate", "zfill")
)

# What comes before the width in a field of a format string.
FIELDS = {
    "%": r"%(\([^)]*\))?[^%a-zA-Z]*",
    **dict.fromkeys(("format", "format_map"), r"\{[^{}]*:[^{}]*"),
}


class Meter:
    """Counts what one rendering does.

    Args:
        characters: most characters of any text.
    Raises:
        jinja2.TemplateError: from the methods, when a bound is passed.
    """

    def __init__(self, characters: int = CHARACTERS) -> None:
        self.steps, self.end = 0, time.thread_time() + SECONDS
        self.largest, self.made = characters // UNIT, 0

    def step(self) -> None:
        """One more round, call or operation."""
        self.steps += 1
        if self.steps > STEPS:
            raise jinja2.TemplateError(f"it takes more than {STEPS:,} steps")
        if not self.steps % 16 and time.thread_time() > self.end:
            raise jinja2.TemplateError(f"it takes more than {SECONDS} seconds")

    def room(self, characters: int) -> None:
        """Raises unless a text of so many characters may be made."""
        if characters > self.largest * UNIT:
            raise jinja2.TemplateError(
                f"it makes a text of more than {self.largest * UNIT:,} characters"
            )

    def keep(self, value: Any) -> Any:
        """The value, counted with all that is in it; generators are counted as they run."""
        if isinstance(value, Iterator) and not isinstance(value, jinja2.runtime.LoopContext):
            return self._counted(value)
        if isinstance(value, str):
            self.room(len(value))
            self.made += 1 + len(value) // UNIT
        elif isinstance(value, Mapping | list | tuple | set | frozenset):
            try:
                self.made += weigh(value, self.largest, UNIT)
            except ValueError as error:
                raise jinja2.TemplateError(f"one of its values {error}") from error
        if self.made > TOTAL * self.largest:
            raise jinja2.TemplateError(
                f"its values have more than {TOTAL * self.largest * UNIT:,} characters together"
            )
        return value

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.step()
            yield self.keep(value)

    def allow(self, name: str, given: Items[Any]) -> None:
        """Raises if a function would make too large a value of these arguments.

        Args:
            name: of a filter, or of a method whose object is the first argument.
            given: the arguments.
        """
        self.step()
        first = given[0] if given else None
        rest = given[1:]
        if name in PADDING and any(_is_above(value, WIDTH) for value in given[1:]):
            raise jinja2.TemplateError(f"{name} by more than {WIDTH:,}")
        texts = [value for value in rest if isinstance(value, str)]
        longest = max(map(len, texts), default=0)
        if name in ("indent", "expandtabs") and isinstance(first, str):
            wide = max([longest, *(int(v) for v in rest if _is_above(v, 0))], default=8)
            self.room(len(first) + (first.count("\n") + first.count("\t") + 1) * max(wide, 8))
        elif name == "replace" and isinstance(first, str) and len(texts) == 2:
            self.room(len(first) + first.count(texts[0]) * len(texts[1]))
        elif name == "join":
            items, mark = (
                (rest[0] if rest else (), first) if isinstance(first, str) else (first, "")
            )
            between = len(mark) or longest
            self.room(len(items) * between if hasattr(items, "__len__") else 0)
        elif name in FIELDS:
            self._format(name, str(first), rest)
        elif name == "translate":
            self.room(len(str(first)) * max(1, *(weigh(v, self.largest, 1) for v in rest)))
        elif name == "sum" and rest and not isinstance(rest[-1], numbers.Number | str):
            self.room(len(first) ** 2 if hasattr(first, "__len__") else 0)
        elif name in ("encode", "decode") and rest:  # some codecs take quadratic time
            self.room(len(first) ** 2 // UNIT)

    def _format(self, name: str, text: str, given: Items[Any]) -> None:
        """Checks the fields of a format string, which may pad and repeat."""
        values = [v for each in given for v in (each if isinstance(each, tuple) else [each])]
        values += [v for each in given if isinstance(each, Mapping) for v in each.values()]
        is_open = "*" in text or re.search(r"\{[^{}]*\{", text)  # a value may be the width
        wide = re.search(FIELDS[name] + r"\d{5}", text)
        if wide or (is_open and any(_is_above(value, WIDTH) for value in values)):
            raise jinja2.TemplateError(f"a format is padded by more than {WIDTH:,}")
        try:
            size = max((weigh(value, self.largest, 1) for value in given), default=0)
        except ValueError:
            size = self.largest
        self.room(len(text) + (text.count("{") + text.count("%")) * size)


METER: ContextVar[Meter] = ContextVar("METER")


class Generator(CodeGenerator):
    """Compiles the literals and the operator ~ of a template so that their results are counted."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        """Joined texts."""
        self.write("environment.concatenated((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        """A list."""
        self._kept(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        """A table."""
        self._kept(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        """A tuple, or the targets of an assignment."""
        if node.ctx == "load":
            self._kept(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _kept(self, visit: Callable[..., None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.kept(")
        visit(node, frame)
        self.write(")")


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with every operation, call and filter on the `Meter`."""

    code_generator_class = Generator
    intercepted_binops = frozenset(("*", "**", "+", "%"))

    @property
    def tick(self) -> None:
        """One step; templates are compiled to read it in every round of a loop."""
        METER.get().step()

    @staticmethod
    def kept(value: Any) -> Any:
        """A literal."""
        return METER.get().keep(value)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Text of a template, block or macro."""
        meter, size, found = METER.get(), 0, []
        for piece in pieces:
            size += len(piece)
            meter.room(size)
            found.append(piece)
        return meter.keep("".join(found))

    def concatenated(self, values: Items[Any]) -> str:
        """The values of a ~ b."""
        METER.get().step()
        return self.concat(map(str, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator."""
        meter = METER.get()
        meter.step()
        sizes = [len(v) for v in (left, right) if isinstance(v, str | bytes | list | tuple)]
        if operator == "*" and sizes:
            times = next((v for v in (left, right) if isinstance(v, numbers.Integral)), 1)
            meter.room(sizes[0] * max(int(times), 0))
        elif operator == "+":
            meter.room(sum(sizes))
        elif operator == "%" and isinstance(left, str):
            meter.allow("%", (left, right))
        elif operator in ("*", "**") and all(isinstance(v, int) for v in (left, right)):
            bits = left.bit_length() * right if operator == "**" else left.bit_length()
            if bits + right.bit_length() > BITS:
                raise jinja2.TemplateError(f"an integer of more than {BITS:,} bits")
        return meter.keep(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """The result of a function, macro or method."""
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        given = args if owner is None else (owner, *args)
        meter = METER.get()
        meter.allow(getattr(method, "__name__", ""), (*given, *kwargs.values()))
        return meter.keep(super().call(__context, __obj, *args, **kwargs))


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are counted."""
    kind = "%" if name == "format" else name
    skip = int(hasattr(function, "jinja_pass_arg"))  # an environment or a context comes first

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.allow(kind, (*args[skip:], *kwargs.values()))
        return meter.keep(function(*args, **kwargs))

    return run


def _is_above(value: Any, bound: int) -> bool:
    return isinstance(value, numbers.Real) and abs(value) > bound
