"""Text in and text out on a terminal: `mmdlm generate` and `mmdlm chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdlm.commands.live import live
from mmdlm.commands.shown import Run, plain, print_result
from mmdlm.files import read_lines

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM
    from mmdlm.tasks.generate import Answer

HELP = (
    "/image FILE and /audio FILE show something to the model, /reset forgets the conversation, "
    "/exit (or the end of input) leaves"
)
SINGLE = "this checkpoint has no chat template, so each question is answered by itself"


@dataclass(frozen=True)
class Say:
    """How answers are made.

    Args:
        system: system message before everything else.
        length: tokens of an answer's canvas; by default the checkpoint's own, else 128.
        decoding: decoding preset (see mmdlm list decoding) or YAML file; by default the
            checkpoint's own.
        seed: of decodings that draw random numbers.
        details: also show forwards and time.
        live: draw the answers on stderr while they are decoded, coloured by confidence.
    """

    system: str | None = None
    length: int | None = None
    decoding: str | None = None
    seed: int | None = None
    details: bool = False
    live: bool = False

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `mmdlm.generate`."""
        given = {name: getattr(self, name) for name in ("length", "seed", "details")}
        return given | {"strategies": self.decoding}

    def opening(self) -> list[dict[str, str]]:
        """The messages a conversation begins with."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def generate(
    run: Run, say: Say, texts: list[str] = (), file: Path | None = None, raw: bool = False
) -> int:
    """Answers texts, by a checkpoint that takes text.

    mmdlm generate "Why is the sky blue?" --model GSAI-ML/LLaDA-8B-Instruct
    mmdlm generate --file prompts.jsonl --model my-model --json > answers.jsonl

    Args:
        texts: what is said to the model, each on its own.
        file: more of them, one per line; in a .jsonl each line is a text or a list of messages,
            {"role": ..., "content": ...}, or has one as its "prompt" or "messages".
        raw: continue the texts as they are, without the checkpoint's chat template.
        run: which model runs, and where.
        say: how answers are made.
    """
    from mmdlm.tasks.chat import generate as answer

    prompts = [*texts, *(() if file is None else _read(file))]
    if not prompts:
        raise ValueError("nothing to answer; give texts, or --file with one per line")
    if raw and say.system is not None:
        raise ValueError("--system has no place in a --raw text; leave one of them out")
    asked: list[Any] = prompts
    if say.system is not None:
        turns = ([{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts)
        asked = [[*say.opening(), *turn] for turn in turns]
    model = run.load()
    options = say.options() | {"chat": False if raw else None}
    for start in range(0, len(asked), run.batch_size):
        group = slice(start, start + run.batch_size)
        with live(say.live):
            found = answer(model, asked[group], batch_size=run.batch_size, **options)
        for prompt, result in zip(prompts[group], found, strict=True):
            print_result({"prompt": prompt, **plain(result)}, run.json, None)
    return 0


def chat(checkpoint: str, say: Say, device: str = "auto", dtype: str = "auto") -> int:
    """Talks with a checkpoint, line by line, about images and clips if it takes them.

    mmdlm chat GSAI-ML/LLaDA-8B-Instruct
    mmdlm chat tiny

    /image cat.jpg and /audio clip.wav put a file before what is said next; /reset forgets the
    conversation, /exit or the end of the input leaves. A text model needs a chat template; without
    one, a model with encoders answers each question by itself, about the files shown so far.

    Args:
        checkpoint: bundled name, folder, or hub id (owner/name).
        device: "auto" takes the GPU if there is one; "cpu", "cuda".
        dtype: "float32", "bfloat16", "float16"; "auto" is float32 on a CPU.
        say: how answers are made.
    """
    talk = Conversation(Run(checkpoint, device, dtype).load(), say)
    if talk.is_single:
        print(SINGLE, flush=True)
    failed = False
    for line in _lines():
        command, _, argument = line.strip().partition(" ")
        if command == "/exit":
            break
        try:
            if command == "/reset":
                talk.reset()
                print("forgotten", flush=True)
            elif command in ("/image", "/audio"):
                print(talk.show(command[1:], argument.strip()), flush=True)
            elif command.startswith("/"):
                print(f"{line} is unknown; {HELP}", flush=True)
            else:
                with live(say.live):
                    found = talk.ask(line)
                print(found.text, flush=True)
                if say.details:
                    print(f"    {found.forwards} forwards, {found.seconds:.3f} s", flush=True)
        except (ValueError, OSError) as error:  # such as a conversation that outgrew the context
            failed = True
            print(f"mmdlm: error: {error}; {HELP}", file=sys.stderr, flush=True)
    return int(failed)


class Conversation:
    """What was said so far, and the media that go with the next question.

    Args:
        model: the model that answers.
        say: how answers are made.
    Raises:
        ValueError: a text model without a chat template.
    """

    def __init__(self, model: MultimodalDLM, say: Say) -> None:
        self.model, self.say = model, say
        self.is_single = model.processor.jinja is None and len(model.encoders) > 0
        if not self.is_single:  # reports what is missing before the first question
            hello = [*say.opening(), {"role": "user", "content": "hello"}]
            model.processor.prompt(hello, chat=True)
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages: list[dict[str, Any]] = list(self.say.opening())
        self.media: list[dict[str, Any]] = []

    def show(self, kind: str, path: str) -> str:
        """Reads a file for the next question, and describes it.

        Args:
            kind: "image" or "audio".
            path: the file.
        Raises:
            ValueError: the model does not take this modality, or the file is not valid.
            FileNotFoundError: there is no such file.
        """
        if not path:
            raise ValueError(f"/{kind} needs a file")
        item = self.model.processor.prepare(kind, path)
        self.media.append({"type": kind, kind: item})
        size = f", {item.size[1]} x {item.size[0]} pixels" if item.size else ""
        return f"{path}: {kind}{size}"

    def ask(self, text: str) -> Answer:
        """The answer to what is said next; a failed question leaves the conversation as it was."""
        content: Any = [*self.media, {"type": "text", "text": text}] if self.media else text
        asked = [*self.messages, {"role": "user", "content": content}]
        options = self.say.options() | {"details": True}
        if self.is_single:
            from mmdlm.tasks.answer import answer

            return answer(self.model, asked, **options)
        from mmdlm.tasks.chat import generate

        found = generate(self.model, asked, **options)
        self.messages = [*asked, {"role": "assistant", "content": found.text}]
        self.media = []
        return found


def _lines() -> Iterator[str]:
    """What is typed, or piped in, without empty lines."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        with suppress(ImportError):  # Windows' terminal has history and cursor keys of its own
            import readline  # noqa: F401

        print(HELP)
    while True:
        try:
            line = input("> " if is_typed else "").removeprefix("\ufeff")  # byte order mark
        except EOFError:
            return
        if line.strip():
            yield line


def _read(file: Path) -> list[Any]:
    """The prompts in a file.

    Raises:
        ValueError: a line holds neither a text nor messages.
    """
    lines = read_lines(file)
    if file.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is no JSON: {error}") from error
        if isinstance(value, dict):
            value = value.get("messages", value.get("prompt"))
        if not isinstance(value, str | list):
            raise ValueError(f"{file}, line {number} has no text and no messages")
        found.append(value)
    return found
