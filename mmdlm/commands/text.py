"""Text in and text out on a terminal: `mmdlm generate` and `mmdlm chat`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdlm.commands.live import live
from mmdlm.commands.shown import Output, Run, plain, print_result
from mmdlm.files import read_input

if TYPE_CHECKING:
    from torch import Tensor

    from mmdlm.model import MultimodalDLM
    from mmdlm.tasks.generate import Answer
    from mmdlm.tasks.results import Results

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
    run: Run,
    say: Say,
    output: Output,
    texts: list[str] = (),
    file: Path | None = None,
    raw: bool = False,
) -> int:
    """Answers texts, by a checkpoint that takes text.

    mmdlm generate "Why is the sky blue?" --model GSAI-ML/LLaDA-8B-Instruct
    mmdlm generate --file prompts.jsonl --model my-model --out answers.jsonl

    A text that cannot be answered is reported at the end (exit status 1); the others are answered.

    Args:
        texts: what is said to the model, each on its own.
        file: more of them, one per line; in a .jsonl each line is a text or a list of messages,
            {"role": ..., "content": ...}, or has one as its "prompt" or "messages".
        raw: continue the texts as they are, without the checkpoint's chat template.
        run: which model runs, and where.
        say: how answers are made.
        output: where the results are kept.
    """
    lines = [Line(text, f"text {i}") for i, text in enumerate(texts, 1)]
    lines += () if file is None else _read(file)
    if not lines:
        raise ValueError("nothing to answer; give texts, or --file with one per line")
    if raw and say.system is not None:
        raise ValueError("--system has no place in a --raw text; leave one of them out")
    output.check()
    model, failed, todo = run.load(), [], list(_repeated(lines))
    with _opened(model, say, raw, output) as results, live(say.live):
        if results is not None:
            keys = {_key(line.record) for line in todo}
            done = results.finished(keys, is_gone=lambda key: True)
            todo = [line for line in todo if _key(line.record) not in done]
        for record in _answered(model, todo, run.batch_size, say, raw):
            if results is not None:
                keep = results.fail if "error" in record else results.add
                keep(results.fields | record)
            if "error" in record:
                failed.append(record)
            elif results is None or run.json:
                print_result(record, run.json, None)
    for record in failed:
        print(f"mmdlm: failed: {record['place']}: {record['error']}", file=sys.stderr)
    if output.out is not None:
        counts = f"{len(todo) - len(failed)} done, {len(lines) - len(todo)} done before"
        print(f"{output.out}: {counts}, {len(failed)} failed", file=sys.stderr)
    return int(bool(failed))


def _opened(
    model: MultimodalDLM, say: Say, raw: bool, output: Output
) -> AbstractContextManager[Results | None]:
    """The results file of a `generate` job, or a context without one."""
    if output.out is None:
        return nullcontext()
    from mmdlm.tasks.chat import resolve
    from mmdlm.tasks.fingerprint import made_with
    from mmdlm.tasks.results import Results

    settings = resolve(model, say.length, say.decoding)
    made = made_with(model, settings, {"seed": say.seed})
    job = {"task": "generate", "system": say.system, "raw": raw or None}
    return Results(output.out, job, made, _key, redo=output.redo, keep=output.keep)


@dataclass(frozen=True)
class Line:
    """A prompt of `mmdlm generate`.

    Args:
        prompt: text or messages; of a line that cannot be read, the line.
        place: where it stands, for errors.
        error: why it cannot be read.
        repeat: number of equal prompts before it.
    """

    prompt: Any
    place: str
    error: Exception | None = None
    repeat: int = 0

    @property
    def record(self) -> dict[str, Any]:
        """What identifies the prompt in a file of results."""
        return {"prompt": self.prompt} | ({"repeat": self.repeat} if self.repeat else {})


def _key(record: dict[str, Any]) -> tuple[str, int]:
    """Identity of a result's prompt."""
    return json.dumps(record["prompt"], sort_keys=True), record.get("repeat", 0)


def _repeated(lines: list[Line]) -> Iterator[Line]:
    """The lines with the number of equal prompts before each."""
    seen: Counter[str] = Counter()
    for line in lines:
        text, _ = _key(line.record)
        yield replace(line, repeat=seen[text])
        seen[text] += 1


def _answered(
    model: MultimodalDLM, lines: list[Line], batch_size: int, say: Say, raw: bool
) -> Iterator[dict[str, Any]]:
    """Records of the lines, in order: results, and failures with "error" and "place"."""
    from mmdlm.tasks.chat import each

    asked = [line.prompt for line in lines if line.error is None]
    if say.system is not None:
        turns = ([{"role": "user", "content": p}] if isinstance(p, str) else p for p in asked)
        asked = [[*say.opening(), *turn] for turn in turns]
    options = say.options() | {"chat": False if raw else None}
    answers = each(model, asked, batch_size=batch_size, **options)
    for line in lines:
        found = next(answers) if line.error is None else line.error
        if isinstance(found, Exception):
            notes = getattr(found, "__notes__", ())
            error = " ".join([f"{type(found).__name__}: {found}", *notes])
            yield line.record | {"place": line.place, "error": error}
        else:
            yield line.record | plain(found)


def chat(
    checkpoint: str,
    say: Say,
    device: str = "auto",
    dtype: str = "auto",
    adapter: str | None = None,
) -> int:
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
        adapter: folder or hub id of a LoRA adapter of the model, merged into its weights.
        say: how answers are made.
    """
    talk = Conversation(Run(checkpoint, device, dtype, adapter=adapter).load(), say)
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
        self.features: dict[Hashable, Tensor] = {}

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
        # Not the item: among several images it is prepared otherwise by some models.
        self.media.append({"type": kind, kind: path})
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

        found = generate(self.model, asked, features=self.features, **options)
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


def _read(file: Path) -> list[Line]:
    """The prompts in a file, with an error for each line that holds neither text nor messages.

    Raises:
        ValueError: the file is not text in UTF-8.
    """
    places = {f"{file}, line {i}": line for i, line in enumerate(read_input(file).split("\n"), 1)}
    read = _parsed if file.suffix.lower() == ".jsonl" else Line
    return [read(line, place) for place, line in places.items() if line.strip()]


def _parsed(line: str, place: str) -> Line:
    """A line of a .jsonl file."""
    try:
        value = json.loads(line)
    except ValueError as error:
        return Line(line, place, ValueError(f"the line is not valid JSON: {error}"))
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    if isinstance(value, str | list):
        return Line(value, place)
    return Line(line, place, ValueError("the line has no text and no messages"))
