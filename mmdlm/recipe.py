"""Objects as plain data, `{"class_path": ..., "init_args": {...}}`, as YAML configs spell them.

The one place that turns encoders, adapters and decoding strategies into data and back. It names no
package: each caller says which packages a recipe may come from (`mmdlm.blueprint`: encoders and
adapters, `mmdlm.decoding.preset`: its own folder). So it can be imported by both, and no module
has to know one that is above it.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from encoders.arguments import Recorded
from mmdlm import discover
from mmdlm.files import UNFIT

Recipe = dict[str, Any]
"""`class_path`, the full dotted name of a class, and `init_args`, plain types or recipes."""

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
FIELDS = {"class_path", "init_args"}


def recipe(made: Any) -> Recipe:
    """The recipe of an object, in new lists and dictionaries.

    Args:
        made: an encoder or adapter (their constructor arguments are recorded), a dataclass such as
            a decoding strategy, or a recipe.

    Raises:
        TypeError: the object is of another kind, or an argument is not plain data.
    """
    if isinstance(made, Mapping):
        return _plain(made, "recipe")
    if isinstance(made, Recorded):
        given = made.arguments
    elif dataclasses.is_dataclass(made) and not isinstance(made, type):
        given = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    else:
        raise TypeError(
            f"{made!r} has no recipe; expected an encoder, an adapter or a decoding strategy"
        )
    cls = type(made)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": _plain(given, cls)}


def _plain(value: Any, owner: Any) -> Any:
    """A value as JSON and YAML hold it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Recorded):
        return recipe(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each, owner) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, owner) for each in value]
    raise TypeError(f"{owner}: {value!r} is not plain data; use numbers, strings or lists of them")


def check(given: Any, packages: Sequence[str]) -> None:
    """Raises unless a value has the form of a recipe and names something in these packages.

    Classes are not looked up: `build` does that.

    Args:
        given: what a file holds.
        packages: where the class may be, such as ("encoders", "adapters").

    Raises:
        ValueError: an entry is missing, unknown or of the wrong kind, or the class is elsewhere.
    """
    path = given.get("class_path") if isinstance(given, Mapping) else given
    if not isinstance(given, Mapping) or not isinstance(path, str) or set(given) - FIELDS:
        raise ValueError(f"{given!r} is not a recipe; expected {{class_path: ..., init_args: ...}}")
    if not isinstance(given.get("init_args") or {}, Mapping):
        raise ValueError(f"{path}: init_args is {given['init_args']!r}, expected a table")
    if PATH.fullmatch(path) is None or not any(path.startswith(f"{p}.") for p in packages):
        raise ValueError(
            f"class_path {path!r} is outside {' and '.join(packages)}; a checkpoint may name "
            "nothing else"
        )
    for value in (given.get("init_args") or {}).values():
        if _is_recipe(value):
            check(value, packages)


def build(
    given: Mapping[str, Any],
    packages: Sequence[str],
    base: type,
    change: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Any:
    """The object a recipe describes.

    Args:
        given: see `Recipe`; recipes inside `init_args` are built too, lists become tuples.
        packages: where the class may be.
        base: the class it derives from.
        change: called with the arguments of each class before it is built.

    Raises:
        ValueError: it is not a recipe, the class is elsewhere or does not exist, or it does not
            take these arguments, or values of this kind.
    """
    check(given, packages)
    cls = find(given["class_path"], packages, base)
    arguments = {}
    for name, value in change(dict(given.get("init_args") or {})).items():
        if _is_recipe(value):
            value = build(value, packages, base, change)
        arguments[name] = tuple(value) if isinstance(value, list) else value
    try:
        inspect.signature(cls.__init__).bind(None, **arguments)
    except TypeError as error:
        takes = list(inspect.signature(cls.__init__).parameters)[1:]
        raise ValueError(f"{cls.__name__} takes {takes}, not {sorted(arguments)}") from error
    try:
        return cls(**arguments)
    except (RuntimeError, *UNFIT) as error:
        raise ValueError(f"{cls.__name__} does not take {arguments}: {error}") from error


def find(path: str, packages: Sequence[str], base: type) -> type:
    """The class of a dotted path.

    A class that has moved to a sub-folder of its package is found under its old path too, by the
    names of its file and of itself.

    Args:
        path: full dotted name.
        packages: where the class may be.
        base: the class it derives from.

    Raises:
        ValueError: there is no such class.
    """
    check({"class_path": path}, packages)
    package = next(p for p in packages if path.startswith(f"{p}."))
    module, _, name = path.rpartition(".")
    for place in _modules(module, package):
        cls = getattr(importlib.import_module(place), name, None)
        known = isinstance(cls, type) and issubclass(cls, base) and cls is not base
        if known and cls.__module__ == place:
            return cls
    paths = [each for package in packages for each in discover.paths(package).values()]
    near = difflib.get_close_matches(path, paths, 1)
    names = ", ".join(sorted(p.rpartition(".")[2] for p in paths))
    hint = f"did you mean {near[0]}?" if near else f"known: {names}"
    raise ValueError(
        f"class_path {path!r} does not name a class of {' or '.join(packages)}; {hint}"
    )


def complete(given: Recipe, packages: Sequence[str], base: type) -> Recipe:
    """A recipe with the defaults of the arguments it leaves out, to compare it with another.

    Args:
        given: see `Recipe`.
        packages: where the class may be.
        base: the class it derives from.

    Raises:
        ValueError: see `find`.
    """
    cls = find(given["class_path"], packages, base)
    empty = inspect.Parameter.empty
    parameters = inspect.signature(cls.__init__).parameters.values()
    arguments = {p.name: p.default for p in parameters if p.default is not empty}
    arguments |= given.get("init_args") or {}
    full = {
        name: complete(value, packages, base)
        if _is_recipe(value)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in arguments.items()
    }
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": full}


def _modules(module: str, package: str) -> list[str]:
    """The module itself where it exists, else modules below the package with its file name."""
    root = Path(next(iter(importlib.util.find_spec(package).submodule_search_locations)))
    inside = module.removeprefix(package).lstrip(".").split(".")
    if root.joinpath(*inside).with_suffix(".py").is_file():
        return [module]
    found = sorted(root.rglob(f"{inside[-1]}.py")) if inside[-1] else []
    return [".".join((package, *f.relative_to(root).with_suffix("").parts)) for f in found]


def _is_recipe(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value
