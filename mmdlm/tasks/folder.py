"""Run a task over many files, writing one JSON line per result; failures do not stop the job."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
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
from mmdlm.tasks.generate import Answer, check_batch_size, resolve_settings
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
    """Number of files done in this run, skipped (done by an earlier run), and failed."""

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
    """Run a task over files and folders, appending results to a JSON Lines file.

    Results are written after each batch. A file that fails is recorded with its error in
    `<out>.failed.jsonl`, and the job continues. A second call with the same `out` resumes: it
    processes the files without a result for this task (and question), failures included.

    Args:
        model: model.
        task: "caption", "answer" (with question=...), "describe", "transcribe" or "embed".
        paths: files, and folders to search for files.
        out: JSON Lines file, appended to.
        batch_size: files per batch.
        kind: kind of files to search for with "embed".
        progress: show a progress bar; None: on a terminal only.
        on_record: called with each record, including failures (key "error").
        **options: keyword arguments of the task function.
    Returns:
        numbers of files done, skipped and failed.
    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: the task, its options or `out` are not valid; nothing was written.
        ImportError: a library needed to read the files does not load.
    """
    out = Path(out)
    kind = _kind(task, kind)
    found = find_media(paths, kind)
    job = {"task": task, "question": options.get("question")}
    done = finished(out, job, lambda record: Path(record["file"]).resolve())
    todo = [path for path in found if path.resolve() not in done]
    records = each(model, task, todo, batch_size=batch_size, kind=kind, **options)
    bar = tqdm(
        total=len(todo), desc=task, unit="file", disable=None if progress is None else not progress
    )
    failed = 0
    with bar:
        for record in append(out, records):
            failed += "error" in record
            if on_record is not None:
                on_record(record)
            bar.update()
    return Counts(len(todo) - failed, len(found) - len(todo), failed)


def append(out: Path, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the records after each was appended to `out`, or to `<out>.failed.jsonl`.

    Args:
        out: JSON Lines file.
        records: results, and failures, which have an "error".
    """
    failures = out.with_suffix(".failed.jsonl")
    failures.unlink(missing_ok=True)  # they are tried again
    out.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair in a prompt becomes its JSON escape.
    given = {"mode": "a", "encoding": "utf-8", "errors": "backslashreplace"}
    with out.open(**given) as lines:
        for record in records:
            line = json.dumps(record, ensure_ascii=False) + "\n"
            if "error" in record:
                with failures.open(**given) as broken:
                    broken.write(line)
            else:
                lines.write(line)
                lines.flush()
            yield record


def each(
    model: MultimodalDLM,
    task: str,
    files: Items[Path],
    *,
    batch_size: int = 16,
    kind: Literal["image", "audio"] | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Yields a record per file with its result or its "error".

    Args:
        model: model.
        task: see `run_folder`.
        files: media files.
        batch_size: files per batch.
        kind: see `run_folder`.
        **options: keyword arguments of the task function.
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
            raise  # a missing or broken library fails for every file
        except Exception as error:  # noqa: BLE001 - damaged files raise all kinds of exceptions
            yield _record(task, file, options) | {"error": _error_text(error)}
        if len(batch) == batch_size:
            yield from _results(model, task, batch, options)
            batch = {}
    if batch:
        yield from _results(model, task, batch, options)


def _results(
    model: MultimodalDLM, task: str, batch: dict[Path, Prepared], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields the records of a batch; if the batch fails, its items are run one by one."""
    try:
        results = _run(model, task, list(batch.values()), options)
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 - one failure must not stop the other files
        if len(batch) == 1:
            yield _record(task, *batch, options) | {"error": _error_text(error)}
            return
        for file, item in batch.items():
            yield from _results(model, task, {file: item}, options)
        return
    for file, result in zip(batch, results, strict=True):
        yield _record(task, file, options) | result


def _run(
    model: MultimodalDLM, task: str, items: list[Prepared], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Results of a batch as JSON-serializable dicts."""
    size = len(items)
    if task == "embed":
        vectors = embed(model, **{items[0].kind: items}, batch_size=size, **options)
        return [{"embedding": vector} for vector in vectors.tolist()]
    if task == "answer":
        rest = {name: value for name, value in options.items() if name != "question"}
        results = answer(model, options["question"], items, batch_size=size, **rest)
    else:
        verb = {"caption": caption, "describe": describe, "transcribe": transcribe}[task]
        results = verb(model, items, batch_size=size, **options)
    return [one.to_dict() if isinstance(one, Answer) else {"text": one} for one in results]


def _kind(task: str, kind: Literal["image", "audio"] | None) -> Literal["image", "audio"]:
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; expected one of {', '.join(TASKS)}")
    return KINDS.get(task, kind or "image")


def _check_options(model: MultimodalDLM, task: str, options: dict[str, Any]) -> None:
    """Raises ValueError for options that would fail for every file."""
    if task == "embed":
        return
    if (task == "answer") != ("question" in options):
        raise ValueError("question='...' is required by the task 'answer' and by no other task")
    settings = resolve_settings(
        model,
        task,
        *(options.get(name) for name in ("prompt", "length", "strategies")),
        needs_prompt=task != "answer",
    )
    prompt = settings.prompt or "{question}"
    model.processor.prompt(prompt.replace("{question}", options.get("question", "")))


def _record(task: str, file: Path, options: dict[str, Any]) -> dict[str, Any]:
    question = {"question": options["question"]} if task == "answer" else {}
    return {"file": str(file), "task": task, **question}


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def finished(
    out: Path, job: dict[str, Any], key: Callable[[dict[str, Any]], Hashable]
) -> set[Hashable]:
    """Keys of the results of a job; an incomplete last line is removed from `out`.

    Args:
        out: JSON Lines file.
        job: fields that the records of the job have; None for a missing one.
        key: what identifies the input of a record.
    Raises:
        ValueError: the file holds something else.
    """
    if not out.exists():
        return set()
    data = out.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    keys = set()
    for number, line in enumerate(complete.decode("utf-8").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            if record["task"] and all(record.get(name) == value for name, value in job.items()):
                keys.add(key(record))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{out}, line {number} is not a result of mmdlm; pass another output file"
            ) from error
    if len(complete) < len(data):
        if data[len(complete) :].lstrip()[:1] != b"{":
            raise ValueError(f"{out} is not a results file of mmdlm; pass another output file")
        os.truncate(out, len(complete))  # in place: a second kill here loses nothing
    return keys
