"""Run a task over many files, writing one JSON line per result; failures do not stop the job."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from encoders.features import Prepared
from mmdlm.lines import escape
from mmdlm.media.search import Found, search_media
from mmdlm.model import MultimodalDLM
from mmdlm.processor import Processor
from mmdlm.tasks.answer import answer
from mmdlm.tasks.caption import caption
from mmdlm.tasks.describe import describe
from mmdlm.tasks.embed import embed
from mmdlm.tasks.fingerprint import made_with
from mmdlm.tasks.generate import Answer, Settings, check_batch_size, resolve_settings
from mmdlm.tasks.inputs import Inputs
from mmdlm.tasks.prefetch import prefetch
from mmdlm.tasks.results import Results
from mmdlm.tasks.transcribe import transcribe

KINDS: dict[str, Literal["image", "audio"]] = {
    "caption": "image",
    "answer": "image",
    "describe": "audio",
    "transcribe": "audio",
}
TASKS = (*KINDS, "embed")
NAMED = ("question", "prompt", "length", "strategies", "details")
"""Options that are resolved, or that change no result."""


Source = dict[str, Any]
"""Identity of an input file, see `mmdlm.tasks.inputs`."""


@dataclass(frozen=True)
class Counts:
    """Number of files done in this run, skipped (done by an earlier run), and failed."""

    done: int
    skipped: int
    failed: int


def run_folder(
    model: MultimodalDLM,
    task: str,
    paths: str | Path | Items[str | Path] | Found,
    out: str | Path,
    *,
    batch_size: int = 16,
    kind: Literal["image", "audio"] | None = None,
    redo: bool = False,
    keep: bool = False,
    workers: int | None = None,
    progress: bool | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Counts:
    """Run a task over files and folders, appending results to a JSON Lines file.

    Results are written after each batch. A file that fails is recorded with its error in
    `<out>.failed.jsonl` (see `mmdlm.tasks.results.failures_file`), and the job continues. A second
    call with the same `out` resumes: it processes the files without a result for this task (and
    question), failures included. Each line also holds what identifies its file ("input", see
    `mmdlm.tasks.inputs`) and its "settings": a file that has changed is processed again, one that
    was moved or copied together with `out` is not.

    Args:
        model: model.
        task: "caption", "answer" (with question=...), "describe", "transcribe" or "embed".
        paths: files, and folders to search for files, or the result of the search, see
            `mmdlm.media.search`.
        out: JSON Lines file, appended to by one process at a time.
        batch_size: files per batch.
        kind: kind of files to search for with "embed".
        redo: process files again whose results were made with another model, prompt or decoding.
        keep: keep such results.
        workers: threads that read files ahead of the model; None: one per core, at most 16.
        progress: show a progress bar; None: on a terminal only.
        on_record: called with each record, including failures (key "error").
        **options: keyword arguments of the task function.
    Returns:
        numbers of files done, skipped and failed.
    Raises:
        FileNotFoundError: there is nothing to process, as a path does not exist.
        BlockingIOError: another process writes to `out`.
        ValueError: the task, its options or `out` are not valid, or results in `out` were made
            with other settings and neither `redo` nor `keep` is given; nothing was written.
        ImportError: a library needed to read the files does not load.
    """
    out, kind = Path(out), _kind(task, kind)
    found = paths if isinstance(paths, Found) else search_media(paths, kind)
    settings = _checked(model, task, kind, batch_size, options)
    for line in found.summary():
        warnings.warn(line, stacklevel=2)
    inputs, failed = Inputs(out), 0
    job = {"task": task, "question": options.get("question")}
    results = Results(out, job, settings, inputs.key_of, redo=redo, keep=keep)
    with results:
        todo = _unfinished(found, inputs, results)
        read = partial(_read, model.processor, kind, inputs.identify)
        records = _each(model, task, todo, batch_size, read, workers, options)
        failures = (
            (inputs.identify(file), _failure(task, file, error, options))
            for file, error in found.failed.items()
        )
        total = len(todo) + len(found.failed)
        hidden = None if progress is None else not progress
        with closing(records), tqdm(total=total, desc=task, unit="file", disable=hidden) as bar:
            for source, record in chain(failures, records):
                if "error" in record:
                    failed += 1
                    results.fail(record, source)
                else:
                    results.add(record, source)
                if on_record is not None:
                    on_record(record)
                bar.update()
    return Counts(total - failed, len(found.files) - len(todo), failed)


def each(
    model: MultimodalDLM,
    task: str,
    files: Items[Path] | Found,
    *,
    batch_size: int = 16,
    kind: Literal["image", "audio"] | None = None,
    workers: int | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Yields a record per file with its result or its "error".

    Args:
        model: model.
        task: see `run_folder`.
        files: media files; or the result of a search, see `mmdlm.media.search`.
        batch_size: files per batch.
        kind: see `run_folder`.
        workers: see `run_folder`.
        **options: keyword arguments of the task function.
    Raises:
        ValueError: the task or its options are not valid; raised before the first record.
    """
    kind = _kind(task, kind)
    _checked(model, task, kind, batch_size, options)
    found = files if isinstance(files, Found) else Found(list(files))
    for line in found.summary():
        warnings.warn(line, stacklevel=2)
    read = partial(_read, model.processor, kind, lambda file: {})
    records = _each(model, task, found.files, batch_size, read, workers, options)
    failures = (_failure(task, *failed, options) for failed in found.failed.items())
    return chain(failures, (record for _, record in records))


def _unfinished(found: Found, inputs: Inputs, results: Results) -> list[Path]:
    """Files without a result, and, with a warning, files that have changed since theirs."""
    keys = {inputs.key(file): file for file in (*found.failed, *found.files)}
    finished = results.finished(keys, is_gone=lambda key: not os.path.lexists(key))
    changed = {
        key for key, source in finished.items() if not inputs.is_unchanged(keys[key], source)
    }
    if changed:
        first = keys[min(changed)]
        warnings.warn(
            f"{len(changed)} files have changed since their result, such as {escape(str(first))}; "
            "they are processed again",
            stacklevel=3,
        )
    done = finished.keys() - changed
    return [file for file in found.files if inputs.key(file) not in done]


def _failure(task: str, file: Path, error: Exception, options: dict[str, Any]) -> dict[str, Any]:
    """Record of a file that failed."""
    notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    text = escape(f"{type(error).__name__}: {error}{notes}")
    return {**_record(task, file, options), "error": text}


def _read(
    processor: Processor, kind: str, identify: Callable[[Path], Source], file: Path
) -> tuple[Source, Prepared | Exception]:
    """Identity of a file, and its preprocessed content or the error; called in threads."""
    source = identify(file)
    try:
        return source, processor.prepare(kind, file)
    except ImportError:
        raise  # a missing or broken library fails for every file
    except Exception as error:  # noqa: BLE001 - damaged files raise all kinds of exceptions
        return source, error


def _each(
    model: MultimodalDLM,
    task: str,
    files: Items[Path],
    batch_size: int,
    read: Callable[[Path], tuple[Source, Prepared | Exception]],
    workers: int | None,
    options: dict[str, Any],
) -> Iterator[tuple[Source, dict[str, Any]]]:
    """Yields identity and record of each file; the next files are read while a batch decodes."""
    batch: list[tuple[Path, Source, Prepared]] = []
    with closing(prefetch(read, files, batch_size, workers)) as ready:
        for file, future in ready:
            source, item = future.result()
            if isinstance(item, Exception):
                yield source, _failure(task, file, item, options)
            else:
                batch.append((file, source, item))
            if len(batch) == batch_size:
                yield from _results(model, task, batch, options)
                batch = []
        if batch:
            yield from _results(model, task, batch, options)


def _results(
    model: MultimodalDLM,
    task: str,
    batch: list[tuple[Path, Source, Prepared]],
    options: dict[str, Any],
) -> Iterator[tuple[Source, dict[str, Any]]]:
    """Yields the records of a batch; if the batch fails, its items are run one by one."""
    try:
        results = _run(model, task, [item for _, _, item in batch], options)
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 - one failure must not stop the other files
        if len(batch) == 1:
            file, source, _ = batch[0]
            yield source, _failure(task, file, error, options)
            return
        for one in batch:
            yield from _results(model, task, [one], options)
        return
    for (file, source, _), result in zip(batch, results, strict=True):
        yield source, _record(task, file, options) | result


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


def _checked(
    model: MultimodalDLM, task: str, kind: str, batch_size: int, options: dict[str, Any]
) -> dict[str, Any]:
    """What determines the results besides the file and the question, as plain values.

    Raises:
        ValueError: options that would fail for every file.
    """
    check_batch_size(batch_size)
    model.processor.require(kind)
    settings = None if task == "embed" else _settings(model, task, options)
    return made_with(model, settings, {n: v for n, v in options.items() if n not in NAMED})


def _settings(model: MultimodalDLM, task: str, options: dict[str, Any]) -> Settings:
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
    return settings


def _record(task: str, file: Path, options: dict[str, Any]) -> dict[str, Any]:
    question = {"question": options["question"]} if task == "answer" else {}
    return {"file": escape(str(file)), "task": task, **question}
