"""Modules that record their constructor arguments, so that a checkpoint can build them again."""

from __future__ import annotations

import inspect
from typing import Any, Self

from encoders.checks import check_arguments


class Recorded:
    """Keeps the constructor arguments it was given, by name, in `arguments`.

    Arguments are plain types (numbers, strings, lists of them) or other `Recorded` objects.
    `mmdlm.recipe` turns them into `{"class_path", "init_args"}` and back.
    """

    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A new instance with `arguments` set; `__init__` runs afterwards, as always."""
        made = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind(made, *args, **kwargs)
        given = dict(list(bound.arguments.items())[1:])
        given.update(given.pop("kwargs", {}))
        check_arguments(cls, given)
        # Not through nn.Module.__setattr__, which needs the module's __init__ to have run.
        object.__setattr__(made, "arguments", given)
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        """The arguments that copy and pickle pass to `__new__`."""
        return (), self.arguments
