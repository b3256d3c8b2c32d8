"""Modules that remember how they were built, so that a checkpoint can build them again."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, Self


class Rebuildable:
    """Keeps its constructor arguments, by name, in `arguments`."""

    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A new instance that remembers what it is being built with."""
        made = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind(made, *args, **kwargs)
        own = dict(list(bound.arguments.items())[1:])
        own.update(own.pop("kwargs", {}))
        # Not through nn.Module.__setattr__, which needs the module's __init__ to have run.
        object.__setattr__(made, "arguments", own)
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        """What copying and unpickling call `__new__` with."""
        return (), self.arguments

    def recipe(self) -> dict[str, Any]:
        """`class_path` and `init_args`, plain types only, as in a YAML config."""
        cls = type(self)
        args = {
            k: v.recipe() if isinstance(v, Rebuildable) else list(v) if isinstance(v, tuple) else v
            for k, v in self.arguments.items()
        }
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": args}


def rebuild(recipe: dict[str, Any]) -> Any:
    """The instance a recipe describes.

    Args:
        recipe: what `Rebuildable.recipe` gave.
    Raises:
        ValueError: the class is not one of the encoders and adapters of this package: a
            checkpoint must not name arbitrary code.
    """
    path = recipe["class_path"]
    module, _, name = path.rpartition(".")
    if module.split(".")[0] not in {"encoders", "adapters"}:
        raise ValueError(f"class_path {path!r} is outside encoders and adapters; refused")
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        cls = None
    if not (isinstance(cls, type) and issubclass(cls, Rebuildable)):
        raise ValueError(f"class_path {path!r} names no encoder or adapter; check config.json")
    args = {
        k: rebuild(v) if isinstance(v, dict) and "class_path" in v else v
        for k, v in recipe.get("init_args", {}).items()
    }
    return cls(**args)
