"""A task over many files: results are kept as they come, broken files do not stop it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from encoders.features import Prepared
from mmdlm.media import find_media
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.answer import answer
from mmdlm.tasks.caption import caption
from mmdlm.tasks.describe import describe
from mmdlm.tasks.embed import embed
from mmdlm.tasks.generate import Answer, check_batch_size, settings
from mmdlm.tasks.transcribe import transcribe

KINDS: dict[str, Literal["image", "audio"]] = {
    "caption": "image",
    "answer": "image",
    "describe": "audio",
    "transcribe": "audio",
}
TASKS = (*KINDS, "embed")


@dataclass(frozen=True)
class Counts:
    """What a folder job did: files finished now, finished by an earlier run, and broken."""

    done: int
    skipped: int
    failed: int


def run_folder(
    model: MultimodalDLM,
    task: str,
    paths: str | Path | Items[str | Path],
    out: str | Path,
    *,
    batch_size: int = 16,
    kind: Literal["image", "audio"] | None = None,
    progress: bool | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Counts:
    """What was done, after every file has its line in `out` or in the list of failures.

    A line is written as soon as its batch is finished. A file that cannot be read, or whose result
    cannot be computed, is named with its error in `<out>.failed.jsonl` beside `out`, and the others
    go on. Called again with the same `out`, only files without a line for this task (and question)
    are worked on, failures among them.

    Args:
        model: the model.
        task: "caption", "answer" (with question=...), "describe", "transcribe" or "embed".
        paths: files, and folders that are searched for files.
        out: JSON Lines file, appended to.
        batch_size: files per batch.
        kind: what to look for, with "embed".
        progress: show a bar; None: on a terminal only.
        on_record: called with each line, failures ("error") included.
        **options: of the task's function.
    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: the task, its options or `out` are not valid; nothing was written.
        ImportError: a library that the files need does not load.
    """
    out = Path(out)
    kind = _kind(task, kind)
    found = find_media(paths, kind)
    done = _finished(out, task, options.get("question"))
    todo = [path for path in found if path.resolve() not in done]
    records = each(model, task, todo, batch_size=batch_size, kind=kind, **options)
    failures = out.with_suffix(".failed.jsonl")
    failed = 0
    failures.unlink(missing_ok=True)  # this run tries them again
    out.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        total=len(todo), desc=task, unit="file", disable=None if progress is None else not progress
    )
    with out.open("a", encoding="utf-8") as lines, bar:
        for record in records:
            line = json.dumps(record, ensure_ascii=False) + "\n"
            if "error" in record:
                failed += 1
                with failures.open("a", encoding="utf-8") as broken:
                    broken.write(line)
            else:
                lines.write(line)
                lines.flush()
            if on_record is not None:
                on_record(record)
            bar.update()
    return Counts(len(todo) - failed, len(found) - len(todo), failed)


def each(
    model: MultimodalDLM,
    task: str,
    files: Items[Path],
    *,
    batch_size: int = 16,
    kind: Literal["image", "audio"] | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """A record for each file: its result, or its "error".

    Args:
        model: the model.
        task: see `run_folder`.
        files: media files.
        batch_size: files per batch.
        kind: see `run_folder`.
        **options: of the task's function.
    Raises:
        ValueError: the task or its options are not valid; raised before the first record.
    """
    kind = _kind(task, kind)
    check_batch_size(batch_size)
    model.processor.require(kind)
    _check_options(model, task, options)
    return _each(model, task, files, batch_size, kind, options)


def _each(
    model: MultimodalDLM,
    task: str,
    files: Items[Path],
    batch_size: int,
    kind: str,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    batch: dict[Path, Prepared] = {}
    for file in files:
        try:
            batch[file] = model.processor.prepare(kind, file)
        except ImportError:
            raise  # a library is missing or broken: every other file would fail in the same way
        except Exception as error:  # noqa: BLE001 - decoders of damaged files raise of every kind
            yield _record(task, file, options) | {"error": _said(error)}
        if len(batch) == batch_size:
            yield from _results(model, task, batch, options)
            batch = {}
    if batch:
        yield from _results(model, task, batch, options)


def _results(
    model: MultimodalDLM, task: str, batch: dict[Path, Prepared], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Records of a batch; should it fail as a whole, of its items one by one."""
    try:
        results = _run(model, task, list(batch.values()), options)
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the other files
        if len(batch) == 1:
            yield _record(task, *batch, options) | {"error": _said(error)}
            return
        for file, item in batch.items():
            yield from _results(model, task, {file: item}, options)
        return
    for file, result in zip(batch, results, strict=True):
        yield _record(task, file, options) | result


def _run(
    model: MultimodalDLM, task: str, items: list[Prepared], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """What a task gives for a batch, as plain types."""
    size = len(items)
    if task == "embed":
        vectors = embed(model, **{items[0].kind: items}, batch_size=size, **options)
        return [{"embedding": vector} for vector in vectors.tolist()]
    if task == "answer":
        rest = {name: value for name, value in options.items() if name != "question"}
        found = answer(model, options["question"], items, batch_size=size, **rest)
    else:
        verb = {"caption": caption, "describe": describe, "transcribe": transcribe}[task]
        found = verb(model, items, batch_size=size, **options)
    return [one.to_dict() if isinstance(one, Answer) else {"text": one} for one in found]


def _kind(task: str, kind: Literal["image", "audio"] | None) -> Literal["image", "audio"]:
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; expected one of {', '.join(TASKS)}")
    return KINDS.get(task, kind or "image")


def _check_options(model: MultimodalDLM, task: str, options: dict[str, Any]) -> None:
    """Raises once what would otherwise fail for every file."""
    if task == "embed":
        return
    if (task == "answer") != ("question" in options):
        raise ValueError("question='...' goes with the task 'answer', and with no other")
    how = settings(
        model,
        task,
        *(options.get(name) for name in ("prompt", "length", "strategies")),
        needs_prompt=task != "answer",
    )
    asked = (how.prompt or "{question}").replace("{question}", options.get("question", ""))
    model.processor.prompt(asked)


def _record(task: str, file: Path, options: dict[str, Any]) -> dict[str, Any]:
    asked = {"question": options["question"]} if task == "answer" else {}
    return {"file": str(file), "task": task, **asked}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _finished(out: Path, task: str, question: str | None) -> set[Path]:
    """Files that have a line for this task; a last line that was cut short is taken off."""
    if not out.exists():
        return set()
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    files = set()
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            if (record["task"], record.get("question")) == (task, question):
                files.add(Path(record["file"]).resolve())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{out}, line {number} is no result of mmdlm; give another file for the results"
            ) from error
    if len(whole) < len(data):
        if data[len(whole) :].lstrip()[:1] != b"{":
            raise ValueError(f"{out} is no file of results; give another one")
        out.write_bytes(whole)
    return files
