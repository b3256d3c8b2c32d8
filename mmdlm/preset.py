"""How a checkpoint is asked and decoded, as plain data: the contents of its decoding.yaml."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml

from mmdlm import discover

FIELDS = {"prompt", "length", "strategies", "tasks", "execute"}


def read(file: Path) -> dict[str, dict[str, Any]]:
    """What a checkpoint says about each task, in plain types, checked.

    Args:
        file: YAML with an entry per task: `prompt`, `length` (tokens of the canvas), `strategies`
            (recipes), and for acting `tasks` (simulators it knows) and `execute` (actions per
            query).

    Raises:
        ValueError: it is no such file, or a recipe is wrong, see `strategy`.
    """
    try:
        table = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML ({error}); export it again") from error
    if not isinstance(table, dict):
        raise ValueError(f"{file}: expected an entry per task, found {type(table).__name__}")
    for task, entry in table.items():
        unknown = set(entry) - FIELDS if isinstance(entry, dict) else {type(entry).__name__}
        if unknown:
            raise ValueError(
                f"{file}: task {task!r} has {sorted(unknown)}; expected some of {sorted(FIELDS)}"
            )
        for each in entry.get("strategies") or ():
            strategy(each)
    return table


def write(file: Path, preset: dict[str, dict[str, Any]]) -> None:
    """Writes the entries of all tasks as YAML; strategies may be instances or recipes."""
    plain = {
        task: {k: [recipe(s) for s in v] if k == "strategies" and v else v for k, v in e.items()}
        for task, e in preset.items()
    }
    file.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")


def strategy(recipe: Any) -> Any:
    """The decoding strategy of a recipe.

    Args:
        recipe: `class_path` below mmdlm.decoding, and `init_args`. Paths of the first edition,
            which had all strategies in one folder, are found by the name of the class.

    Raises:
        ValueError: the class is none of `mmdlm.decoding` (a checkpoint must not name arbitrary
            code), or it does not take these arguments.
    """
    path = recipe.get("class_path", "") if isinstance(recipe, dict) else str(recipe)
    name, known = path.rpartition(".")[2], discover.paths("mmdlm.decoding")
    if name not in known or path not in (known[name], _flat(known[name])):
        near = difflib.get_close_matches(path, known.values(), 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
        raise ValueError(f"class_path {path!r} names no strategy of mmdlm.decoding{hint}")
    kind = discover.find("mmdlm.decoding", name)
    given = recipe.get("init_args") or {}
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except TypeError as error:
        takes = [f.name for f in dataclasses.fields(kind)]
        raise ValueError(f"{name} takes {takes}, not {sorted(given)}") from error


def _flat(path: str) -> str:
    """Path of a strategy in the first edition: mmdlm.decoding.threshold.Threshold."""
    package, (module, name) = "mmdlm.decoding", path.split(".")[-2:]
    return f"{package}.{module}.{name}"


def recipe(strategy: Any) -> dict[str, Any]:
    """`class_path` and `init_args` of a decoding strategy (or of its recipe)."""
    if isinstance(strategy, dict):
        return strategy
    values = {f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy)}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    cls = type(strategy)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": plain}
