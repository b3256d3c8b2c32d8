"""Discovery of the classes of a package by name.

A package has one base class and modules with subclasses, which are found without registration.
Files are parsed, and imported only when a class is requested.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path

# Base class of each package.
BASES = {
    "encoders": "encoders.encoder.Encoder",
    "adapters": "adapters.adapter.Adapter",
    "mmdlm.backbones": "mmdlm.backbones.family.Family",
    "mmdlm.systems": "mmdlm.systems.system.System",
    "mmdlm.decoding": "mmdlm.decoding.strategy.Strategy",
    "mmdlm.objectives": "mmdlm.objectives.objective.Objective",
    "mmdlm.data": "mmdlm.data.dataset.Dataset",
    "mmdlm.simulators": "mmdlm.simulators.simulator.Simulator",
}


# Header of a top-level class with bases: `class Name(Base, Other[T]):`.
CLASS = re.compile(r"^(class (\w+)\([^:]*\):)", re.MULTILINE)


def names(package: str, base: type | None = None) -> list[str]:
    """Sorted names of modules that define a public subclass of the base, in all sub-packages.

    Args:
        package: dotted name, such as "mmdlm.decoding".
        base: base class; None: the one of that package, see `BASES`.

    Raises:
        ValueError: the package is unknown, or it has no base class and none is given.
    """
    return sorted(map(_stem, _classes_by_module(package, _base_name(package, base))))


def classes(package: str, base: type | None = None) -> dict[str, type]:
    """Public subclasses of the base by class name, sorted; imports their modules.

    Args:
        package: dotted name, such as "mmdlm.decoding".
        base: base class; None: the one of that package, see `BASES`.
    """
    found = _classes_by_module(package, _base_name(package, base))
    pairs = sorted((name, module) for module, held in found.items() for name in held)
    return {name: _load(package, module, name) for name, module in pairs}


def paths(package: str, base: type | None = None) -> dict[str, str]:
    """Dotted path of every public subclass of the base, by class name; imports nothing.

    Args:
        package: dotted name, such as "mmdlm.decoding".
        base: base class; None: the one of that package, see `BASES`.
    """
    found = _classes_by_module(package, _base_name(package, base))
    pairs = sorted((name, module) for module, held in found.items() for name in held)
    return {name: f"{package}.{module}.{name}" for name, module in pairs}


def find(package: str, name: str, base: type | None = None) -> type:
    """Class with a given class name or module name.

    Args:
        package: dotted name, such as "mmdlm.decoding".
        name: class or module name; case, "_" and "-" are ignored ("dual_cache", "DualCache").
        base: base class; None: the one of that package, see `BASES`.

    Raises:
        ValueError: no class, or more than one, has that name.
    """
    found = _classes_by_module(package, _base_name(package, base))
    wanted = _squash(name)
    exact = [(m, c) for m, held in found.items() for c in held if _squash(c) == wanted]
    matches = exact or [
        (m, c) for m, held in found.items() for c in held if _squash(_stem(m)) == wanted
    ]
    if len(matches) == 1:
        return _load(package, *matches[0])
    if matches:
        choices = ", ".join(f"{c} ({m}.py)" for m, c in matches)
        raise ValueError(
            f"{package}: {name!r} matches several classes: {choices}; use a class name"
        )
    modules = sorted(map(_stem, found))
    known = sorted({*modules, *(c for held in found.values() for c in held)})
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"{package} has no {name!r}; {hint}known: {', '.join(modules)}")


def _stem(module: str) -> str:
    """Name of a module without its package."""
    return module.rpartition(".")[2]


def _squash(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _base_name(package: str, base: type | None) -> str:
    if base is not None:
        return base.__name__
    if package not in BASES:
        near = difflib.get_close_matches(package, BASES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"discover: {package!r} has no base class; {hint}"
            f"known: {', '.join(BASES)}; for another package give base="
        )
    return BASES[package].rpartition(".")[2]


@cache
def _classes_by_module(package: str, base: str) -> dict[str, tuple[str, ...]]:
    """Public direct and indirect subclasses of `base`, by module relative to the package."""
    parents: dict[str, dict[str, set[str]]] = {}
    folder = _folder(package)
    for path in sorted(folder.rglob("*.py")):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        # A regular expression, because parsing every file would take 10% of `import torch`.
        parents[module] = {
            name: {_last_name(parent) for parent in _bases(header)}
            for header, name in CLASS.findall(path.read_text(encoding="utf-8"))
        }
    derived, grew = {base}, True
    while grew:
        more = {c for held in parents.values() for c, above in held.items() if above & derived}
        grew = not more <= derived
        derived |= more
    public = {
        module: tuple(c for c in held if c in derived and c != base and not c.startswith("_"))
        for module, held in parents.items()
    }
    return {module: held for module, held in public.items() if held}


def _folder(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"discover: there is no package {package!r}; known: {', '.join(BASES)}")
    return Path(next(iter(spec.submodule_search_locations)))


def _bases(header: str) -> list[ast.expr]:
    """Base classes in `class Name(Base, Other[T]):`."""
    (node,) = ast.parse(header + " ...").body
    return node.bases if isinstance(node, ast.ClassDef) else []


def _last_name(node: ast.expr) -> str:
    """Name of a base class without module and parameters: "Base" for `module.Base[T]`."""
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _load(package: str, module: str, name: str) -> type:
    return getattr(importlib.import_module(f"{package}.{module}"), name)
