"""Commands that ask a model about files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mmdlm.commands.live import live
from mmdlm.commands.shown import Ask, Output, Run, plain, print_result
from mmdlm.files import read_input

INDEX = Path("index.jsonl")
"""Where mmdlm index writes and mmdlm search reads."""


def caption(files: list[str], run: Run, ask: Ask, output: Output) -> int:
    """Says what pictures show.

    mmdlm caption cat.png dog.png
    mmdlm caption photos/ --out captions.jsonl --batch-size 32

    Args:
        files: pictures, and folders that are searched for pictures.
        run: which model runs, and where.
        ask: how the answer is decoded.
        output: where the results are kept.
    """
    return _over_files("caption", files, run, output, ask.options(), ask=ask)


def answer(
    question: str,
    run: Run,
    ask: Ask,
    output: Output,
    files: list[str] = (),
    image: list[str] | None = None,
    choices: list[str] | None = None,
    stop: list[str] | None = None,
) -> int:
    """Answers a question about each image, about several images at once, or about none.

    mmdlm answer scene.png --question "what colour is the circle ?"
    mmdlm answer scenes/ --question "is there a square ?" --choices yes,no --out answers.jsonl
    mmdlm answer --image a.png --image b.png --question "what has changed ?" --model my-model
    mmdlm answer chart.png --question "what is the title ?" --stop "." --model my-model

    Args:
        question: the question.
        files: images, and folders that are searched for images; one answer each.
        image: an image of the question; given several times, the question is about all of them.
        choices: possible answers, separated by commas; the most probable one is given.
        stop: a text before which an answer ends; may be given several times.
        run: which model runs, and where.
        ask: how the answer is decoded.
        output: where the results are kept.
    """
    options = ask.options() | {"choices": choices} | ({"stop": stop} if stop else {})
    if files and image:
        raise ValueError("--image is for one question; leave out either it or the files")
    if files:
        return _over_files("answer", files, run, output, options | {"question": question}, ask=ask)
    if output != Output():
        raise ValueError(
            "--out, --redo and --keep are for answers about files; name images or a folder"
        )
    from mmdlm.tasks.answer import answer as tell

    asked: Any = question
    if image:
        parts = [{"type": "image", "image": file} for file in image]
        parts.append({"type": "text", "text": question})
        asked = [{"role": "user", "content": parts}]
    model = run.load()
    with live(ask.live):
        result = tell(model, asked, batch_size=run.batch_size, **options)
    print_result(ask.draw({"question": question, **plain(result)}), run.json, "question")
    return 0


def describe(files: list[str], run: Run, ask: Ask, output: Output) -> int:
    """Says what sounds are.

    mmdlm describe street.wav --model owner/audio-model --prompt "what do you hear?"

    Args:
        files: recordings, and folders that are searched for recordings.
        run: which model runs, and where.
        ask: how the answer is decoded.
        output: where the results are kept.
    """
    return _over_files("describe", files, run, output, ask.options(), ask=ask)


def transcribe(files: list[str], run: Run, ask: Ask, output: Output) -> int:
    """Writes down what is said.

    mmdlm transcribe phrase.wav
    mmdlm transcribe recordings/ --out words.jsonl

    Args:
        files: recordings, and folders that are searched for recordings.
        run: which model runs, and where.
        ask: how the answer is decoded.
        output: where the results are kept.
    """
    return _over_files("transcribe", files, run, output, ask.options(), ask=ask)


def infill(
    run: Run,
    ask: Ask,
    templates: list[str] = (),
    image: str | None = None,
    schema: Path | None = None,
) -> int:
    """Fills in the missing words of texts; [MASK] is one token, [MASK:3] three.

    mmdlm infill "a [MASK] circle" --image scene.png
    mmdlm infill --schema person.json --prompt "Ada Lovelace, born 1815" --model my-model

    Args:
        templates: texts with slots; with --schema, pictures.
        image: picture the texts are about.
        schema: file of a JSON schema; what is filled in is JSON of it.
        run: which model runs, and where.
        ask: how the answer is decoded.
    """
    from mmdlm.tasks.infill import infill as fill

    named, asked, media = list(templates), list(templates), image
    if schema is not None:
        try:
            wanted = json.loads(read_input(schema))
        except ValueError as error:
            raise ValueError(f"{schema} is no JSON: {error}") from error
        media = [*named, *([image] if image else [])] or None
        named, asked = media or [None], [wanted] * len(media or [None])
    elif not templates:
        raise ValueError("nothing to fill in; give texts with [MASK], or --schema FILE.json")
    ask.check(len(asked))
    model = run.load()
    with live(ask.live):
        results = fill(model, asked, media, batch_size=run.batch_size, **ask.options())
    for one, result in zip(named, results, strict=True):
        record = {"file" if schema else "template": one, **plain(result)}
        print_result(ask.draw(record, one if schema else image), run.json, None)
    return 0


def embed(
    files: list[str],
    run: Run,
    output: Output,
    kind: Literal["image", "audio"] = "image",
    masks: int | None = None,
    pooling: Literal["mean", "text", "last"] = "mean",
) -> int:
    """Gives a vector of unit length for each picture or recording.

    mmdlm embed cat.png
    mmdlm embed calls/ --kind audio --out vectors.jsonl

    Args:
        files: media files, and folders that are searched for them.
        kind: what to look for.
        masks: append this number of mask tokens and give a vector for each of them.
        pooling: what is averaged: mean (all tokens), text, or last (token).
        run: which model runs, and where.
        output: where the results are kept.
    """
    options = {"masks": masks, "pooling": pooling}
    given = {name: value for name, value in options.items() if value not in (None, "mean")}
    return _over_files("embed", files, run, output, given, kind)


def index(
    files: list[str],
    run: Run,
    output: Output,
    kind: Literal["image", "audio"] = "image",
    masks: int | None = None,
    pooling: Literal["mean", "text", "last"] = "mean",
) -> int:
    """Makes or completes the index that mmdlm search reads: the vectors of mmdlm embed, in a file.

    mmdlm index photos/
    mmdlm search "a red circle"

    Args:
        files: media files, and folders that are searched for them.
        kind: what to look for.
        masks: append this number of mask tokens and give a vector for each of them.
        pooling: what is averaged: mean (all tokens), text, or last (token).
        run: which model runs, and where.
        output: where the index is kept; by default in index.jsonl.
    """
    return embed(files, run, replace(output, out=output.out or INDEX), kind, masks, pooling)


def search(query: list[str], run: Run, index: Path = INDEX, top: int = 5) -> int:
    """Finds the pictures or recordings that are most like a text, picture or recording.

    mmdlm search "a red circle"
    mmdlm search holiday.jpg --index photos.jsonl --top 10

    Args:
        query: texts, or media files; one result list each.
        index: what mmdlm index wrote.
        top: results per query.
        run: which model runs, and where; the one that made the index.
    """
    from mmdlm.tasks.retrieval import Index
    from mmdlm.tasks.retrieval import search as find

    vectors = Index.read(index)
    model = run.load()
    for asked, results in zip(query, find(model, vectors, query, top), strict=True):
        if run.json:
            found = [{"file": file, "score": score} for file, score in results]
            print(json.dumps({"query": asked, "results": found}, ensure_ascii=False), flush=True)
            continue
        print(f"{asked}:")
        for file, score in results:
            print(f"  {score:.3f}  {file}")
    return 0


def _over_files(
    task: str,
    files: list[str],
    run: Run,
    output: Output,
    options: dict[str, Any],
    kind: Literal["image", "audio"] | None = None,
    ask: Ask | None = None,
) -> int:
    """Runs a task over files and prints or keeps its results; exit status 1 with failures."""
    from mmdlm.media.search import search_media
    from mmdlm.tasks.folder import KINDS, each, run_folder
    from mmdlm.tasks.results import failures_file

    output.check()
    kind = KINDS.get(task, kind)
    found = search_media(files, kind)
    ask = ask or Ask()
    ask.check(len(found.files))
    model = run.load()
    out, failed = output.out, 0

    def show(record: dict[str, Any]) -> None:
        nonlocal failed
        if "error" not in record:
            record = ask.draw(record, found.files[0] if kind == "image" else None)
        if "error" in record:
            failed += 1
            print(f"mmdlm: failed: {record['file']}: {record['error']}", file=sys.stderr)
        elif out is None or run.json:
            print_result(record, run.json, "file")

    with live(ask.live):
        given = {"batch_size": run.batch_size, "kind": kind, **options}
        if out is None:
            for record in each(model, task, found, **given):
                show(record)
            return int(failed > 0)
        given |= {"redo": output.redo, "keep": output.keep}
        counts = run_folder(model, task, found, out, on_record=show, **given)
    broken = f" (named in {failures_file(out)})" if counts.failed else ""
    print(
        f"{out}: {counts.done} done, {counts.skipped} done before, {counts.failed} failed{broken}",
        file=sys.stderr,
    )
    return int(counts.failed > 0)
