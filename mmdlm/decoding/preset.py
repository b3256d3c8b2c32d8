"""Strategies from the name of a preset."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

from mmdlm import recipe
from mmdlm.decoding.strategy import Strategy
from mmdlm.files import blaming, present, read_yaml

PACKAGE = "mmdlm.decoding"
Choice = str | Items[Strategy | Mapping[str, Any]] | None
"""A preset's name or file, or strategies as instances or `{class_path, init_args}`."""


def strategies(spec: Choice) -> list[Strategy]:
    """Strategy instances of a preset or a list.

    Args:
        spec: name of a preset ("fast_dllm" is the first of ./configs/decoding/fast_dllm.yaml and
            the copy that comes with mmdlm), a path ending in .yaml, a list whose items are Strategy
            instances or `{"class_path": ..., "init_args": {...}}`, or None for the loop's defaults.

    Raises:
        FileNotFoundError: no such preset or file.
        ValueError: a class is not a strategy of mmdlm.decoding, or does not take these arguments.
        TypeError: the spec is not a list.
    """
    if isinstance(spec, str):
        path = find(spec)
        spec = read_yaml(path)
        if not isinstance(spec, list):
            raise ValueError(f"{path} holds {type(spec).__name__}, expected a list of strategies")
        with blaming(path):
            return [strategy(item) for item in spec]
    if spec is None:
        return []
    if not isinstance(spec, Items):
        raise TypeError(f"strategies is {spec!r}; give a list, e.g. [TopK(steps=8)], or a preset")
    return [item if isinstance(item, Strategy) else strategy(item) for item in spec]


def strategy(given: Mapping[str, Any]) -> Strategy:
    """The strategy of a recipe.

    Args:
        given: `class_path` below mmdlm.decoding, and `init_args`. A path of an earlier edition is
            found by the names of file and class.

    Raises:
        ValueError: it does not name a strategy, or the strategy does not take these arguments.
    """
    return recipe.build(given, [PACKAGE], Strategy)


def check(tasks: Mapping[str, Mapping[str, Any]], source: Path) -> None:
    """Raises unless every strategy in a checkpoint's defaults can be built.

    Args:
        tasks: entries by task, see `mmdlm.blueprint.Blueprint`.
        source: the checkpoint, for errors.

    Raises:
        ValueError: the first that cannot, see `strategy`.
    """
    for task, entry in tasks.items():
        for each in entry.get("strategies") or ():
            with blaming(f"{source}: task {task!r}"):
                strategy(each)


def effective(spec: Choice, length: int) -> list[Strategy]:
    """Strategies as in `strategies`, with a warning about those too coarse for the answer.

    Args:
        spec: see `strategies`.
        length: positions of the answer.
    """
    found = strategies(spec)
    idle = [repr(each) for each in found if each.idle(length)]
    if idle:
        warnings.warn(
            f"{', '.join(idle)} changes nothing in an answer of {length} tokens; choose smaller "
            "numbers, or a longer answer",
            stacklevel=4,
        )
    return found


def names() -> list[str]:
    """Names of all presets in reach, sorted."""
    return sorted({path.stem for folder in folders() for path in folder.glob("*.yaml")})


def folders() -> list[Path]:
    """Where presets are looked for: the working directory, the installed copy, the repository."""
    package = Path(__file__).resolve().parents[1]
    return [root / "configs" / "decoding" for root in (Path.cwd(), package, package.parent)]


def find(name: str) -> Path:
    """The file of a preset.

    Raises:
        FileNotFoundError: there is none.
    """
    if name.endswith(".yaml"):
        if present(Path(name)):
            return Path(name)
        raise FileNotFoundError(f"there is no file {name}; known presets: {', '.join(names())}")
    for folder in folders():
        # Compared with what is there, so that a name cannot lead out of the folder.
        if (path := folder / f"{name}.yaml") in folder.glob("*.yaml"):
            return path
    near = difflib.get_close_matches(name, names(), n=2)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise FileNotFoundError(
        f"there is no decoding preset {name!r}; {hint}known: {', '.join(names())}"
    )
