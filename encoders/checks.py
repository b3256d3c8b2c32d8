"""Range checks declared in the annotations of a dataclass.

    @dataclass(frozen=True)
    class TopK(Checked):
        steps: PositiveInt | None = None
        order: Literal["first", "best"] = "best"

    TopK(steps=0)  # ValueError: TopK.steps is 0, expected at least 1

Rules that concern several fields go into `__post_init__`, after `super().__post_init__()`.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)


@dataclass(frozen=True, repr=False)
class Constraint:
    """A comparison with a fixed bound, which NaN never satisfies.

    Attributes:
        WORDS: the comparison, as errors and `--help` print it.
        COMPARE: called with the value and the bound.
    """

    bound: float
    WORDS: ClassVar[str]
    COMPARE: ClassVar[Callable[[Any, float], bool]]

    def __call__(self, value: Any) -> bool:
        """Whether the value satisfies the constraint."""
        return type(self).COMPARE(value, self.bound)

    def __repr__(self) -> str:
        """The constraint in words."""
        return "finite" if self.bound == math.inf else f"{self.WORDS} {self.bound}"


class AtLeast(Constraint):
    """The value is `bound` or more."""

    WORDS, COMPARE = "at least", operator.ge


class AtMost(Constraint):
    """The value is `bound` or less."""

    WORDS, COMPARE = "at most", operator.le


class Above(Constraint):
    """The value is greater than `bound`."""

    WORDS, COMPARE = "above", operator.gt


class Below(Constraint):
    """The value is less than `bound`; `Below(math.inf)` reads "finite"."""

    WORDS, COMPARE = "below", operator.lt


class LengthAtLeast(Constraint):
    """A string or a tuple has `bound` elements or more."""

    WORDS = "a length of at least"

    def __call__(self, value: Any) -> bool:
        """Whether the value has enough elements."""
        return len(value) >= self.bound


PositiveInt = Annotated[int, AtLeast(1)]
NonNegativeInt = Annotated[int, AtLeast(0)]
PositiveFloat = Annotated[float, Above(0), Below(math.inf)]
NonNegativeFloat = Annotated[float, AtLeast(0), Below(math.inf)]
# A threshold on a number without an upper bound; nothing reaches infinity.
Limit = Annotated[float, AtLeast(0)]
# A probability or a share.
UnitFloat = Annotated[float, AtLeast(0), AtMost(1)]
# Sizes and factors that files give; the bounds are far above those of any published model.
Count = Annotated[int, AtLeast(1), AtMost(2**26)]
CountOrZero = Annotated[int, AtLeast(0), AtMost(2**26)]
Factor = Annotated[float, AtLeast(1e-6), AtMost(1e6)]
# Side of an image in pixels, mean and standard deviation of its channels.
Side = Annotated[int, AtLeast(1), AtMost(2**13)]
Mean = Annotated[float, AtLeast(-1e3), AtMost(1e3)]
Deviation = Annotated[float, AtLeast(1e-4), AtMost(1e4)]
# A threshold that probabilities are compared with; above 1 no probability reaches it.
Cutoff = Annotated[float, AtLeast(0), "a probability"]

KINDS = {
    bool: ("a bool", bool),
    int: ("an integer", numbers.Integral),
    float: ("a number", numbers.Real),
    str: ("a string", str),
}


SHOWN = 300  # characters of a value in an error


class Match(NamedTuple):
    """Result of comparing a value with an annotation.

    Args:
        value: the value; a list or a range became a tuple where the annotation is a tuple.
        expected: what the annotation expects, in words; empty if the value satisfies it.
        error: what to raise if it does not.
    """

    value: Any
    expected: str = ""
    error: type[Exception] = ValueError


class Checked:
    """Mixin for dataclasses, frozen or not, whose annotations are checked on construction."""

    def __post_init__(self) -> None:
        """Checks every field with `check`."""
        check(self)


def check(instance: Any) -> None:
    """Compares each field of a dataclass instance with its annotation.

    Checked are bool, int, float (NaN is refused) and str, `Literal`, `Annotated` with the
    constraints of this module, unions of these (also with None) and tuples of these. Other
    annotations accept any value. A list or a range is replaced by a tuple where the annotation is
    a tuple, since YAML has only lists. A string in `Annotated` names the quantity in the error
    ("a probability").

    Args:
        instance: the dataclass instance; replaced lists are written to it even if it is frozen.
    Raises:
        ValueError: a value violates a constraint or is not one of the literals.
        TypeError: a value has another type, or an annotation cannot be evaluated at run time.
    """
    cls = type(instance)
    for name, hint in _annotations(cls).items():
        value = getattr(instance, name)
        match = _match(hint, value)
        if match.expected:
            raise match.error(f"{cls.__name__}.{name} is {shown(value)}, expected {match.expected}")
        if match.value is not value:
            object.__setattr__(instance, name, match.value)


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Compares the arguments of a function with its annotations, see `check`.

    Args:
        function: the function, or a class for its constructor.
        given: arguments by name; those that it does not name are not checked.
    Raises:
        ValueError: a value violates a constraint or is not one of the literals.
        TypeError: a value has another type.
    """
    for name, hint in _parameters(function).items():
        if name in given and (match := _match(hint, given[name])).expected:
            raise match.error(
                f"{function.__name__}: {name} is {shown(given[name])}, expected {match.expected}"
            )


def shown(value: Any) -> str:
    """A value as errors print it, shortened where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, deep nesting
        return f"a very large {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


@functools.cache
def _parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Evaluated annotation of each argument of a function or constructor."""
    called = function.__init__ if isinstance(function, type) else function
    return get_type_hints(called, include_extras=True)


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    """Evaluated annotation of each field that the constructor takes."""
    try:
        hints = get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"annotations of {cls.__qualname__} cannot be evaluated: {error}; import the name "
            "outside of TYPE_CHECKING"
        ) from error
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def _match(hint: Any, value: Any) -> Match:
    """Compares a value with an evaluated annotation."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _match_union(get_args(hint), value)
    if origin is Annotated:
        return _match_constraints(hint.__origin__, hint.__metadata__, value)
    if origin is Literal:
        known = get_args(hint)
        words = " or ".join(map(repr, known)) if len(known) < 3 else f"one of {_listed(known)}"
        return Match(value) if value in known else Match(value, words)
    if origin is tuple:
        return _match_tuple(get_args(hint), value)
    if hint in KINDS:
        words, kind = KINDS[hint]
        fits = isinstance(value, kind) and (hint is bool or not isinstance(value, bool))
        if fits and hint is float and math.isnan(value):
            return Match(value, words)
        return Match(value) if fits else Match(value, words, TypeError)
    return Match(value)


def _match_union(options: tuple[Any, ...], value: Any) -> Match:
    """Succeeds if one option does; otherwise reports what all of them expect."""
    if value is None and types.NoneType in options:
        return Match(value)
    misses = []
    for option in options:
        if option is not types.NoneType:
            match = _match(option, value)
            if not match.expected:
                return match
            misses.append(match)
    error = TypeError if all(miss.error is TypeError for miss in misses) else ValueError
    return Match(value, " or ".join(miss.expected for miss in misses), error)


def _match_constraints(base: Any, metadata: tuple[Any, ...], value: Any) -> Match:
    """Compares with the type first, then with every constraint."""
    match = _match(base, value)
    constraints = [item for item in metadata if isinstance(item, Constraint)]
    if not match.expected:
        for constraint in constraints:
            if not constraint(match.value):
                break
        else:
            return match
    quantity = [item for item in metadata if isinstance(item, str)]
    words = " and ".join(map(repr, constraints))
    is_nan = base is float and match.error is ValueError  # the constraints say what is expected
    if match.expected and not is_nan:
        return match._replace(expected=", ".join([*(quantity or [match.expected]), words]))
    return Match(value, ", ".join([*quantity, words]))


def _match_tuple(hints: tuple[Any, ...], value: Any) -> Match:
    """Compares each element; a fixed number of elements where there is no ellipsis."""
    if not isinstance(value, list | tuple | range):
        return Match(value, "a list", TypeError)
    is_open = hints[-1:] == (...,)
    if is_open and hints[0] in KINDS and set(map(type, value)) <= {hints[0]}:
        return Match(tuple(value))  # without a call per element: there may be a whole vocabulary
    each = hints[:1] * len(value) if is_open else hints
    if len(each) != len(value):
        return Match(value, f"{len(each)} values")
    matches = [_match(hint, element) for hint, element in zip(each, value, strict=True)]
    misses = [match for match in matches if match.expected]
    if misses:
        return Match(value, f"a list, each {misses[0].expected}", misses[0].error)
    result = tuple(match.value for match in matches)
    return Match(value if isinstance(value, tuple) and result == value else result)


def _listed(known: tuple[Any, ...]) -> str:
    """The literals, separated by commas."""
    return ", ".join(map(repr, known))
