import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pytest

from encoders.checks import (
    Above,
    AtLeast,
    Below,
    Checked,
    Cutoff,
    LengthAtLeast,
    NonNegativeFloat,
    PositiveInt,
    UnitFloat,
)


@dataclass(frozen=True)
class Base(Checked):
    steps: PositiveInt | None = None
    tau: Cutoff = 0.9


@dataclass(frozen=True)
class Rule(Base):
    share: UnitFloat = 0.5
    eps: Annotated[float, Above(0), Below(1)] = 0.1
    shift: Annotated[float, AtLeast(0), Below(math.inf)] = 1.0
    mode: Literal["first", "best"] = "best"
    order: Literal["a", "b", "c"] = "a"
    sizes: Annotated[tuple[PositiveInt, ...], LengthAtLeast(1)] | None = None
    region: tuple[int, int] | None = None
    rate: NonNegativeFloat | Literal["auto"] = "auto"
    weight: float = 1.0
    name: str = ""
    on: bool = False
    payload: object = None


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"steps": 0}, ValueError, "Rule.steps is 0, expected at least 1"),
        ({"steps": 2.5}, TypeError, "Rule.steps is 2.5, expected an integer, at least 1"),
        ({"steps": True}, TypeError, "Rule.steps is True, expected an integer, at least 1"),
        ({"tau": None}, TypeError, "Rule.tau is None, expected a probability, at least 0"),
        ({"tau": -1}, ValueError, "Rule.tau is -1, expected a probability, at least 0"),
        ({"tau": math.nan}, ValueError, "Rule.tau is nan, expected a probability, at least 0"),
        ({"tau": "x"}, TypeError, "Rule.tau is 'x', expected a probability, at least 0"),
        ({"share": 1.5}, ValueError, "Rule.share is 1.5, expected at least 0 and at most 1"),
        ({"eps": 1}, ValueError, "Rule.eps is 1, expected above 0 and below 1"),
        ({"eps": 0}, ValueError, "Rule.eps is 0, expected above 0 and below 1"),
        ({"shift": math.inf}, ValueError, "Rule.shift is inf, expected at least 0 and finite"),
        ({"rate": math.inf}, ValueError, "Rule.rate is inf, expected at least 0 and finite"),
        ({"weight": math.nan}, ValueError, "Rule.weight is nan, expected a number"),
        ({"mode": "last"}, ValueError, "Rule.mode is 'last', expected 'first' or 'best'"),
        ({"order": 1}, ValueError, "Rule.order is 1, expected one of 'a', 'b', 'c'"),
        ({"sizes": ()}, ValueError, r"Rule.sizes is \(\), expected a length of at least 1"),
        ({"sizes": (4, 0)}, ValueError, r"Rule.sizes is \(4, 0\), expected a list, each at least"),
        ({"sizes": 4}, TypeError, "Rule.sizes is 4, expected a list, a length of at least 1"),
        ({"region": (1, 2, 3)}, ValueError, r"Rule.region is \(1, 2, 3\), expected 2 values"),
        ({"rate": -1.0}, ValueError, "Rule.rate is -1.0, expected at least 0 and finite or 'auto'"),
        ({"name": 3}, TypeError, "Rule.name is 3, expected a string"),
        ({"on": 1}, TypeError, "Rule.on is 1, expected a bool"),
    ],
)
def test_error_names_class_field_value_and_expectation(
    given: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Rule(**given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"steps": 1},
        {"tau": 2},
        {"share": 0},
        {"share": 1.0},
        {"sizes": (4, 1)},
        {"region": (1, 2)},
        {"rate": 0},
        {"rate": "auto"},
        {"payload": [1]},
    ],
)
def test_valid_values_are_kept(given: dict[str, Any]) -> None:
    rule = Rule(**given)
    for name, value in given.items():
        assert getattr(rule, name) is value


def test_lists_become_tuples_where_the_annotation_is_a_tuple() -> None:
    rule = Rule(sizes=[4, 1], region=[0, 8], payload=[1])
    assert (rule.sizes, rule.region, rule.payload) == ((4, 1), (0, 8), [1])
    assert Rule(sizes=range(1, 3)).sizes == (1, 2)


def test_elements_of_another_type_are_refused_in_long_lists() -> None:
    @dataclass(frozen=True)
    class Ids(Checked):
        ids: tuple[int, ...] = ()

    assert Ids([3, 4]).ids == (3, 4)
    assert Ids(range(2)).ids == (0, 1)
    for wrong in ([*range(100), "a"], [True, 3], [0.5]):
        with pytest.raises(TypeError, match="expected a list, each an integer"):
            Ids(wrong)


def test_replace_checks_again() -> None:
    with pytest.raises(ValueError, match=r"Base.steps is -3, expected at least 1"):
        replace(Base(steps=2), steps=-3)


def test_rules_about_several_fields_follow_the_declared_ones() -> None:
    @dataclass
    class Pair(Checked):
        low: PositiveInt = 1
        high: PositiveInt = 2

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.high < self.low:
                raise ValueError(f"Pair.high is {self.high}, expected at least low ({self.low})")

    with pytest.raises(ValueError, match=r"Pair.low is 0, expected at least 1"):
        Pair(low=0, high=-1)
    with pytest.raises(ValueError, match=r"Pair.high is 1, expected at least low \(3\)"):
        Pair(low=3, high=1)


def test_annotation_that_cannot_be_evaluated_is_an_error() -> None:
    @dataclass(frozen=True)
    class Odd(Checked):
        size: "Missing" = 1  # noqa: F821

    with pytest.raises(TypeError, match=r"Odd cannot be evaluated: name 'Missing'.*TYPE_CHECKING"):
        Odd()


def test_constraints_print_in_words() -> None:
    assert str(UnitFloat) == "typing.Annotated[float, at least 0, at most 1]"
