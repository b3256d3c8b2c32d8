"""Command-line options from the signature and docstring of a function, parsed by jsonargparse."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import is_dataclass
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

NEEDED = inspect.Parameter.empty


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of docstrings, which hold examples."""


class Parser(ArgumentParser):
    """Suggests the nearest option for one that does not exist."""

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        """Prints the message on stderr and exits with status 2."""
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(match[1].split("=")[0], known, 2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"see {self.prog} --help"
            message = f"unknown {match[1]!r}; {hint}"
        super().error(message, ex)


def arguments(
    function: Callable[..., Any],
    args: Items[str],
    prog: str,
    positional: Items[str] = (),
    repeated: Items[str] = (),
) -> dict[str, Any]:
    """Keyword arguments of a function from a command line.

    A parameter `batch_size` is the option `--batch-size`, a bool is a flag, a list is separated by
    commas, and the fields of a dataclass are options without a prefix.

    Args:
        function: typed, with a Google-style docstring.
        args: the command line.
        prog: name of the command in the help.
        positional: parameters given without their name; a list takes all of them.
        repeated: lists whose option is given once per item.
    Raises:
        SystemExit: status 0 after --help, 2 for wrong arguments.
    """
    parser = Parser(
        prog=prog,
        description=documented(function)[0],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, tuple[type, list[str]]] = {}
    for name, hint, default, text in parameters(function):
        if is_dataclass(hint):
            fields = list(parameters(hint))
            groups[name] = (typing.cast(type, hint), [field[0] for field in fields])
            for field in fields:
                add_option(parser, *field)
        elif name in positional:
            add_positional(parser, name, hint, default, text)
        elif name in repeated:
            parser.add_argument(f"--{name}", action="append", type=item_type(hint), help=text)
        else:
            add_option(parser, name, hint, default, text)
    values = dict(vars(parser.parse_args(list(args))))
    for name, (kind, keys) in groups.items():
        values[name] = kind(**{key: values.pop(key) for key in keys})
    return values


def parameters(thing: Callable[..., Any]) -> typing.Iterator[tuple[str, Any, Any, str]]:
    """Name, type, default and description of each parameter."""
    hints, texts = typing.get_type_hints(thing), documented(thing)[1]
    for name, parameter in inspect.signature(thing).parameters.items():
        yield name, hints[name], parameter.default, texts.get(name, "")


def add_option(parser: Parser, name: str, hint: Any, default: Any, text: str) -> None:
    """Adds `--name VALUE`, or a flag for a bool."""
    flag = "--" + name.replace("_", "-")
    if hint is bool:
        flag, action = (f"--no-{flag[2:]}", "store_false") if default else (flag, "store_true")
        parser.add_argument(flag, dest=name, action=action, default=default, help=text)
        return
    kind = CommaSeparated(hint) if item_type(hint) else hint
    given = {"required": True} if default is NEEDED else {"default": default}
    parser.add_argument(flag, type=kind, help=text, **given)


def add_positional(parser: Parser, name: str, hint: Any, default: Any, text: str) -> None:
    """Adds a value given without a name; a list takes all that are left."""
    item = item_type(hint)
    if item:
        parser.add_argument(name, type=item, nargs="+" if default is NEEDED else "*", help=text)
    elif default is NEEDED:
        parser.add_argument(name, type=hint, help=text)
    else:
        parser.add_argument(name, type=hint, nargs="?", default=default, help=text)


def item_type(hint: Any) -> Any:
    """The type of the items of `list[item]`, also in a union without str; None for other types."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = typing.get_args(hint)
        return None if str in kinds else next(filter(None, map(item_type, kinds)), None)
    return typing.get_args(hint)[0] if typing.get_origin(hint) in (list, tuple) else None


class CommaSeparated:
    """Reads "a,b" as a list.

    Args:
        hint: type with a list in it.
    """

    def __init__(self, hint: Any) -> None:
        self.item = item_type(hint)

    def __call__(self, value: Any) -> Any:
        """The list of a word of the command line; other values are defaults."""
        if not isinstance(value, str):
            return value
        return [self.item(part.strip()) for part in value.split(",")]

    def __repr__(self) -> str:
        """What the help shows as the type."""
        return f"comma-separated {self.item.__name__}"


def documented(thing: Any) -> tuple[str, dict[str, str]]:
    """The text of a docstring above its sections, and the entries of Args by name."""
    about, _, rest = (inspect.getdoc(thing) or "").partition("\nArgs:\n")
    section = re.split(r"\n(?=\S)", rest)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    about = re.split(r"\n(?:Returns|Raises):\n", about)[0]
    return about.strip(), {name: " ".join(text.split()) for name, text in entries}
