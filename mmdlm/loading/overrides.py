"""Values a user gives for what a config.json leaves out or gets wrong."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, get_args

from encoders.checks import shown
from mmdlm.backbones.family import Spec
from mmdlm.chat import PLAIN, TEMPLATES
from mmdlm.layout import Attention

# Of the spec, all that the tensors do not decide; of the transformer, what changes no shape.
SPEC = tuple(f.name for f in dataclasses.fields(Spec) if f.name not in ("family", "transformer"))
TRANSFORMER = ("theta", "theta_scale")


def check(given: dict[str, Any], known: tuple[str, ...] = ()) -> None:
    """Raises unless each name can be overridden and its value makes sense.

    Args:
        given: values by name.
        known: what else the caller takes, for hints.

    Raises:
        TypeError: a name is unknown.
        ValueError: a value is of the wrong kind or out of range.
    """
    names = (*SPEC, *TRANSFORMER)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, [*names, *known], 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"load takes no {name!r}; {hint}overrides are {', '.join(names)}")
    for name, value in given.items():
        wanted = _wanted(name, value)
        if wanted is not None:
            raise ValueError(f"{name}={shown(value)}, expected {wanted}")


def override(spec: Spec, given: dict[str, Any]) -> Spec:
    """A spec with some of its values replaced.

    Args:
        spec: as read from the checkpoint.
        given: values by name, see `check`.

    Raises:
        ValueError: they do not fit together, such as block-causal attention without blocks.
    """
    inner = {name: value for name, value in given.items() if name in TRANSFORMER}
    outer = {name: value for name, value in given.items() if name not in TRANSFORMER}
    if inner:
        outer["transformer"] = dataclasses.replace(spec.transformer, **inner)
    if "stop_ids" in outer:
        outer["stop_ids"] = tuple(outer["stop_ids"])
    changed = dataclasses.replace(spec, **outer)
    if changed.attention == "block_causal" and changed.block_size is None:
        raise ValueError("attention='block_causal' needs block_size=, the tokens per block")
    return changed


def replaced(config: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A config.json in our own layout with the overrides in place, before its values are checked.

    Args:
        config: what the file holds.
        given: values by name, see `check`.
    """
    spec = config.get("spec")
    if not isinstance(spec, Mapping) or not isinstance(spec.get("transformer"), Mapping):
        return dict(config)
    inner = {name: value for name, value in given.items() if name in TRANSFORMER}
    outer = {name: value for name, value in given.items() if name in SPEC}
    return {**config, "spec": {**spec, **outer, "transformer": {**spec["transformer"], **inner}}}


def _wanted(name: str, value: Any) -> str | None:
    """What was expected instead of a value, None when it is right; ids are checked by the spec."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "shift" and not isinstance(value, bool):
        return "True or False"
    if name == "attention" and value not in get_args(Attention):
        return f"one of {', '.join(get_args(Attention))}"
    whole = isinstance(value, int) and number and value > 0
    if name in ("block_size", "context") and not (value is None or whole):
        return "a number of tokens, or None"
    if name in TRANSFORMER and not (number and value > 0):
        return "a number above 0"
    if name == "template" and value not in (*TEMPLATES, PLAIN):
        return f"one of {', '.join((*TEMPLATES, PLAIN))}"
    is_list = isinstance(value, list | tuple | set | frozenset | range)
    if name == "stop_ids" and not (is_list and all(isinstance(i, int) for i in value)):
        return "token ids"
    return None
