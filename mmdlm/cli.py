"""The command `mmdlm`: finds the function of a command, reads its arguments, says what went wrong.

A command is a function; its signature is the list of options and its docstring is the help.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from typing import Any, Literal

import mmdlm

ABOUT = f"""mmdlm {mmdlm.__version__}: caption, ask, transcribe and act with masked-diffusion models

  mmdlm caption picture.png                 what a picture shows, by the bundled model
  mmdlm caption photos/ --out captions.jsonl    a whole folder; run again to go on
  mmdlm COMMAND --help                      the options of a command
"""


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        place: module:function, imported when the command is called; in mmdlm.commands unless the
            module begins with mmdlm.
        line: what it does, for the overview.
        group: heading in the overview.
        positional: parameters given without their name.
    """

    place: str
    line: str
    group: str
    positional: tuple[str, ...] = ()


ASK, TRAIN, LOOK = "Ask a model", "Train and measure", "Look around"
TRAINING = "mmdlm.training.cli:run"
COMMANDS = {
    "caption": Command("ask:caption", "what pictures show", ASK, ("files",)),
    "answer": Command("ask:answer", "a question about pictures", ASK, ("files",)),
    "describe": Command("ask:describe", "what sounds are", ASK, ("files",)),
    "transcribe": Command("ask:transcribe", "what is said", ASK, ("files",)),
    "generate": Command("text:generate", "what follows a text", ASK, ("texts",)),
    "chat": Command("text:chat", "talk with a text model", ASK, ("checkpoint",)),
    "infill": Command("ask:infill", "the [MASK]s of a text", ASK, ("templates",)),
    "embed": Command("ask:embed", "vectors of pictures or sounds", ASK, ("files",)),
    "act": Command("mmdlm.simulators.rollout:act", "drive a simulated robot", ASK),
    "demo": Command("demo:demo", "all of it at once, with the bundled model", ASK),
    "fit": Command(TRAINING, "train: mmdlm fit -c train/tiny", TRAIN),
    "validate": Command(TRAINING, "losses on held-out data", TRAIN),
    "test": Command(TRAINING, "Lightning's test loop", TRAIN),
    "predict": Command(TRAINING, "Lightning's predict loop", TRAIN),
    "bench": Command("mmdlm.benchmarks.scores:bench", "quality and speed", TRAIN, ("what",)),
    "bench presets": Command(
        "mmdlm.benchmarks.tradeoff:bench_presets",
        "accuracy against forwards of every decoding preset",
        TRAIN,
        ("presets",),
    ),
    "export": Command(
        "export:export",
        "a model folder from a training checkpoint",
        TRAIN,
        ("checkpoint",),
    ),
    "filter": Command("filter:train", "a filter for Learn2PD, from prompts", TRAIN, ("prompts",)),
    "data make scenes": Command(
        "data:make_scenes",
        "drawn pictures with captions and questions",
        TRAIN,
        ("out",),
    ),
    "data make speech": Command(
        "data:make_speech", "spoken phrases with their words", TRAIN, ("out",)
    ),
    "data make episodes": Command(
        "data:make_episodes", "robot episodes of a scripted expert", TRAIN, ("out",)
    ),
    "list": Command("about:list_names", "what there is to choose from", LOOK, ("what",)),
    "info": Command("about:info", "what a checkpoint is and can do", LOOK, ("checkpoint",)),
    "doctor": Command("about:doctor", "what works on this machine", LOOK),
}
USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError)


def main(argv: Items[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    0: all is well. 1: some files or checks failed, the others are done. 2: nothing could be done;
    one line on stderr says why, and MMDLM_DEBUG=1 shows where.

    Args:
        argv: command and arguments; None for those of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if args[0] == "--version":
        print(f"mmdlm {mmdlm.__version__}")
        return 0
    try:
        with _short_warnings():
            return _run(args)
    except KeyboardInterrupt:
        print("mmdlm: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except USER_ERRORS as error:
        if os.environ.get("MMDLM_DEBUG") or (args[0] in TRAINERS and not _is_typo(error)):
            raise
        print(f"mmdlm: error: {_said(error)}", file=sys.stderr)
        return 2


TRAINERS = tuple(name for name, command in COMMANDS.items() if command.place == TRAINING)


def overview() -> str:
    """The help of `mmdlm` alone."""
    width = max(map(len, COMMANDS)) + 2
    parts = [ABOUT]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        rows = [(n, c.line) for n, c in COMMANDS.items() if c.group == group]
        parts.append("\n".join([f"{group}:", *(f"  {n:{width}}{line}" for n, line in rows), ""]))
    return "\n".join(parts).rstrip()


def _run(args: list[str]) -> int:
    name, rest = _split(args)
    if name is None:
        return 0
    command = COMMANDS[name]
    module, _, function = command.place.partition(":")
    if command.place == TRAINING:
        getattr(import_module(module), function)([name, *rest])
        return 0
    module = module if module.startswith("mmdlm.") else f"mmdlm.commands.{module}"
    call = getattr(import_module(module), function)
    return int(call(**arguments(call, rest, f"mmdlm {name}", command.positional)) or 0)


def _split(args: list[str]) -> tuple[str | None, list[str]]:
    """The command that the arguments begin with, and the rest; None when its group was listed."""
    for size in (3, 2, 1):
        if " ".join(args[:size]) in COMMANDS:
            return " ".join(args[:size]), args[size:]
    words = []
    for word in args:
        if not any(name.startswith(" ".join([*words, word]) + " ") for name in COMMANDS):
            break
        words.append(word)
    head = " ".join(words)
    known = [name for name in COMMANDS if name.startswith(head + " " if head else "")]
    rest = args[len(words) :]
    if head and (not rest or rest[0] in ("-h", "--help")):
        width = max(map(len, known)) + 2
        print("\n".join(f"mmdlm {name:{width}}{COMMANDS[name].line}" for name in known))
        return None, []
    wrong = " ".join([*words, rest[0]])
    near = difflib.get_close_matches(wrong, known, 2, 0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"there is no command {wrong!r}; {hint}known: {', '.join(known)}")


def arguments(
    function: Callable[..., Any], args: Items[str], prog: str, positional: Items[str] = ()
) -> dict[str, Any]:
    """Keyword arguments of a function from a command line.

    A parameter `batch_size` is the option `--batch-size`, a bool is a flag, a list is separated by
    commas, and the fields of a dataclass are options of their own.

    Args:
        function: typed, with a Google-style docstring.
        args: the command line.
        prog: what the help calls the command.
        positional: parameters given without their name; a list takes all of them.
    """
    about, helps = _documented(function)
    parser = argparse.ArgumentParser(
        prog=prog,
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(function)
    groups: dict[str, tuple[type, list[str]]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        if is_dataclass(hint):
            notes, inner = _documented(hint)[1], typing.get_type_hints(hint)
            fields = inspect.signature(hint).parameters
            groups[name] = (hint, list(fields))
            for key, field in fields.items():
                _add(parser, key, inner[key], field.default, notes.get(key, ""), is_named=True)
        else:
            default, is_named = parameter.default, name not in positional
            _add(parser, name, hint, default, helps.get(name, ""), is_named=is_named)
    found, unknown = parser.parse_known_args(args)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 2)
        parser.error(
            f"unknown {unknown[0]!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else f"see {prog} --help")
        )
    values = vars(found)
    for name, (kind, keys) in groups.items():
        values[name] = kind(**{key: values.pop(key) for key in keys})
    return values


def _add(
    parser: argparse.ArgumentParser,
    name: str,
    hint: Any,
    default: Any,
    text: str,
    *,
    is_named: bool,
) -> None:
    """Adds one parameter to the parser."""
    kind, choices, is_many, may_be_none = _kind(hint)
    is_required = default is inspect.Parameter.empty
    text = text.replace("%", "%%")
    if not is_required and default not in (None, False, (), ""):
        several = isinstance(default, list | tuple)
        text += f" (default: {','.join(map(str, default)) if several else default})"
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        on = "store_false" if default is True else "store_true"
        flag = f"--no-{flag[2:]}" if default is True else flag
        parser.add_argument(flag, dest=name, action=on, help=text)
        return
    given: dict[str, Any] = {"help": text, "metavar": name.upper().replace("_", "-")}
    if choices:
        given |= {"choices": choices, "metavar": None}
    if not is_named:
        count = ("*" if not is_required else "+") if is_many else (None if is_required else "?")
        given["default"] = None if is_required else default
        parser.add_argument(name, type=kind, nargs=count, **given)
        return

    def read(word: str) -> Any:
        if may_be_none and word.lower() in ("none", "null"):
            return None
        return [kind(part.strip()) for part in word.split(",")] if is_many else kind(word)

    read.__name__ = kind.__name__  # what argparse calls it in "invalid int value"
    default = None if is_required else default
    parser.add_argument(flag, dest=name, type=read, required=is_required, default=default, **given)


def _kind(hint: Any) -> tuple[type, list[Any] | None, bool, bool]:
    """Type of one value, allowed values, whether there are many, whether None is one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [each for each in typing.get_args(hint) if each is not type(None)]
        plain = [each for each in inner if typing.get_origin(each) is None]
        return (*_kind((plain or inner)[0])[:3], len(inner) < len(typing.get_args(hint)))
    if typing.get_origin(hint) is Literal:
        values = list(typing.get_args(hint))
        return type(values[0]), values, False, False
    if typing.get_origin(hint) in (list, tuple):
        return (*_kind(typing.get_args(hint)[0])[:2], True, False)
    return hint, None, False, False


def _documented(thing: Any) -> tuple[str, dict[str, str]]:
    """The text of a docstring above its sections, and its Args."""
    about, _, rest = inspect.getdoc(thing).partition("\nArgs:\n")
    section = re.split(r"\n(?=\S)", rest)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    about = re.split(r"\n(?:Returns|Raises):\n", about)[0]
    return about.strip(), {name: " ".join(text.split()) for name, text in entries}


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Shows warnings as one line each, without the code that gave them."""

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        print(f"mmdlm: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _is_typo(error: Exception) -> bool:
    """Whether a training error is about the command line rather than about the training."""
    return isinstance(error, FileNotFoundError | ImportError)


def _said(error: BaseException) -> str:
    """One line for an error."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    notes = getattr(error, "__notes__", [])
    return " ".join(" ".join([text or type(error).__name__, *notes]).split())


if __name__ == "__main__":
    sys.exit(main())
