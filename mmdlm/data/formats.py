"""The format of a file or folder: which data set reads it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmdlm import discover
from mmdlm.data.conversations import Conversations, local


def formats() -> dict[str, type[Conversations]]:
    """Every data set of users' files by class name."""
    found = discover.classes("mmdlm.data", Conversations)
    return {name: found[name] for name in sorted(found)}


def of(path: Path, options: Iterable[str] = ()) -> type[Conversations]:
    """The data set that reads a file or folder.

    Args:
        path: file, folder, or files with a range as in `part-{000..012}.tar`.
        options: names of arguments that the data set must take, such as columns of a table.

    Raises:
        FileNotFoundError: it does not exist.
        TypeError: its data set does not take the options.
        ValueError: its format is unknown, several formats match, or it is on the network.
    """
    path, options = local(path), set(options)
    able = [cls for cls in formats().values() if options <= arguments(cls)]
    found = [cls for cls in able if cls.matches(path)]
    if not found and options:
        found = [cls for cls in able if cls.reads(path)]
    if len(found) == 1:
        return found[0]
    for cls in formats().values():
        if not found and options and cls.matches(path):
            unknown = ", ".join(sorted(options - arguments(cls)))
            known = ", ".join(sorted(arguments(cls)))
            raise TypeError(f"{path} is read by {cls.__name__}, without {unknown}; it has {known}")
    names = ", ".join(cls.__name__ for cls in found or formats().values())
    what = "matches several formats" if found else "has no known format"
    raise ValueError(
        f"{path} {what} ({names}); see mmdlm data formats, name the class in YAML, or for a table "
        "the columns: image=, audio=, question=, answer="
    )


def arguments(cls: type[Conversations]) -> set[str]:
    """Names of the arguments of a data set, without the path."""
    return set(inspect.signature(cls).parameters) - {"path"}


def open_data(path: Path, **options: Any) -> Conversations:
    """The data set of a file or folder.

    Args:
        path: see `of`.
        **options: arguments of its class, such as `length` and `prompt`.

    Raises:
        FileNotFoundError: see `of`.
        TypeError: see `of`.
        ValueError: see `of`, or a row is not valid.
    """
    return of(path, options)(path, **options)
