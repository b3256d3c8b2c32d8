"""Entry point of `mmdlm`: finds a command's function, parses its arguments, reports errors.

A command is a function; its signature is the list of options and its docstring is the help.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import mmdlm
from mmdlm.commands.table import COMMANDS, TRAINERS, TRAINING

ABOUT = f"""mmdlm {mmdlm.__version__}: caption, answer, transcribe, act with masked-diffusion models

  mmdlm caption image.png                   what an image shows, by the bundled model
  mmdlm caption photos/ --out captions.jsonl    a whole folder; run again to resume
  mmdlm COMMAND --help                      the options of a command
"""


SPINS = 1000
"""Turns of a loop, about 15 microseconds, that a thread of PyTorch waits in for the next operation
before it sleeps. GNU OpenMP's default are milliseconds, in which no other program can use its core.
Where training shares its cores it then took 0.5 instead of 4 processor seconds per step."""
USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError)


def main(argv: Items[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    0: success. 1: some files or checks failed, the others are done. 2: nothing was done; one line
    on stderr says why, and with MMDLM_DEBUG=1 there is a traceback.

    Args:
        argv: command and arguments; by default those of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if args[0] == "--version":
        print(f"mmdlm {mmdlm.__version__}")
        return 0
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))  # read once, when torch is imported
    try:
        with _short_warnings():
            return _run(args)
    except KeyboardInterrupt:
        print("mmdlm: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # stdout closed by the reader, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except USER_ERRORS as error:
        if os.environ.get("MMDLM_DEBUG") or (args[0] in TRAINERS and not _is_plain(error)):
            raise
        print(f"mmdlm: error: {_said(error)}", file=sys.stderr)
        return 2


def overview() -> str:
    """The help of `mmdlm` without a command."""
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
    module = module if module.startswith("mmdlm.") else f"mmdlm.commands.{module}"
    call = getattr(import_module(module), function)
    if command.place == TRAINING:
        call([name, *rest])
        return 0
    given = _words(call, rest, command.positional)
    if given is None:
        from mmdlm.commands.arguments import arguments

        given = arguments(call, rest, f"mmdlm {name}", command.positional, command.repeated)
    return int(call(**given) or 0)


def _words(
    call: Callable[..., Any], rest: Items[str], positional: Items[str]
) -> dict[str, str] | None:
    """Arguments of a call that gives words only, such as `mmdlm info tiny`; None for others.

    It saves the import of the parser, which takes longer than such a command itself.
    """
    parameters = list(inspect.signature(call).parameters.values())
    first, more = parameters[: len(positional)], parameters[len(positional) :]
    is_plain = [p.name for p in first] == list(positional) and len(rest) == len(positional)
    is_plain = is_plain and all(p.default is not p.empty for p in more)
    if not is_plain or any(p.annotation not in (str, "str") for p in first):
        return None
    return (
        None
        if any(word.startswith("-") for word in rest)
        else dict(zip(positional, rest, strict=True))
    )


def _split(args: list[str]) -> tuple[str | None, list[str]]:
    """The command at the start of the arguments, and the rest; None after listing a group."""
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


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Shows each warning as one line, without its source code."""

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        print(f"mmdlm: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _is_plain(error: Exception) -> bool:
    """Whether the message of an error of a training command says enough without a traceback.

    Such are missing files and packages, and the errors that our own code raises about its input.
    """
    packages = ("mmdlm", "encoders", "adapters")
    if type(error).__module__.partition(".")[0] in packages:
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    raised_by = last.tb_frame.f_globals["__name__"].partition(".")[0] if last else ""
    is_ours = isinstance(error, ValueError) and raised_by in packages
    return is_ours or isinstance(error, FileNotFoundError | ImportError)


def _said(error: BaseException) -> str:
    """An error, with its notes, as one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    notes = getattr(error, "__notes__", [])
    return " ".join(" ".join([text or type(error).__name__, *notes]).split())


if __name__ == "__main__":
    sys.exit(main())
