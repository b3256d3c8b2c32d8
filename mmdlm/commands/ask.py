"""Commands that ask a model about files: caption, answer, describe, transcribe, infill, embed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from mmdlm.commands.live import live
from mmdlm.commands.shown import Ask, Run, plain, print_result
from mmdlm.files import read_input


def caption(files: list[str], run: Run, ask: Ask, out: Path | None = None) -> int:
    """Says what pictures show.

    mmdlm caption cat.png dog.png
    mmdlm caption photos/ --out captions.jsonl --batch-size 32

    Args:
        files: pictures, and folders that are searched for pictures.
        out: JSON Lines file; run again to go on where it stopped and to retry broken files.
        run: which model runs, and where.
        ask: how the answer is decoded.
    """
    return _over_files("caption", files, run, out, ask.options(), ask=ask)


def answer(
    question: str,
    run: Run,
    ask: Ask,
    files: list[str] = (),
    image: list[str] | None = None,
    choices: list[str] | None = None,
    out: Path | None = None,
) -> int:
    """Answers a question about each image, about several images at once, or about none.

    mmdlm answer scene.png --question "what colour is the circle ?"
    mmdlm answer scenes/ --question "is there a square ?" --choices yes,no --out answers.jsonl
    mmdlm answer --image a.png --image b.png --question "what has changed ?" --model my-model

    Args:
        question: the question.
        files: images, and folders that are searched for images; one answer each.
        image: an image of the question; given several times, the question is about all of them.
        choices: possible answers, separated by commas; the most probable one is given.
        out: JSON Lines file; run again to go on where it stopped and to retry broken files.
        run: which model runs, and where.
        ask: how the answer is decoded.
    """
    options = ask.options() | {"choices": choices}
    if files and image:
        raise ValueError("--image is for one question; leave out either it or the files")
    if files:
        return _over_files("answer", files, run, out, options | {"question": question}, ask=ask)
    if out is not None:
        raise ValueError("--out is for answers about files; name images or a folder")
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


def describe(files: list[str], run: Run, ask: Ask, out: Path | None = None) -> int:
    """Says what sounds are.

    mmdlm describe street.wav --model owner/audio-model --prompt "what do you hear?"

    Args:
        files: recordings, and folders that are searched for recordings.
        out: JSON Lines file; run again to go on where it stopped and to retry broken files.
        run: which model runs, and where.
        ask: how the answer is decoded.
    """
    return _over_files("describe", files, run, out, ask.options(), ask=ask)


def transcribe(files: list[str], run: Run, ask: Ask, out: Path | None = None) -> int:
    """Writes down what is said.

    mmdlm transcribe phrase.wav
    mmdlm transcribe recordings/ --out words.jsonl

    Args:
        files: recordings, and folders that are searched for recordings.
        out: JSON Lines file; run again to go on where it stopped and to retry broken files.
        run: which model runs, and where.
        ask: how the answer is decoded.
    """
    return _over_files("transcribe", files, run, out, ask.options(), ask=ask)


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
    kind: Literal["image", "audio"] = "image",
    out: Path | None = None,
) -> int:
    """Gives a vector of unit length for each picture or recording.

    mmdlm embed photos/ --out vectors.jsonl

    Args:
        files: media files, and folders that are searched for them.
        kind: what to look for.
        out: JSON Lines file; run again to go on where it stopped and to retry broken files.
        run: which model runs, and where.
    """
    return _over_files("embed", files, run, out, {}, kind)


def _over_files(
    task: str,
    files: list[str],
    run: Run,
    out: Path | None,
    options: dict[str, Any],
    kind: Literal["image", "audio"] | None = None,
    ask: Ask | None = None,
) -> int:
    """Runs a task over files and prints or keeps what it gives; exit status 1 with failures."""
    from mmdlm.media import find_media
    from mmdlm.tasks.folder import KINDS, each, run_folder

    kind = KINDS.get(task, kind)
    found = find_media(files, kind)
    ask = ask or Ask()
    ask.check(len(found))
    model = run.load()
    given = {"batch_size": run.batch_size, "kind": kind, **options}
    failed = 0

    def show(record: dict[str, Any]) -> None:
        nonlocal failed
        if "error" not in record:
            record = ask.draw(record, record["file"] if kind == "image" else None)
        if "error" in record:
            failed += 1
            print(f"mmdlm: failed: {record['file']}: {record['error']}", file=sys.stderr)
        elif out is None or run.json:
            print_result(record, run.json, "file")

    with live(ask.live):
        if out is None:
            for record in each(model, task, found, **given):
                show(record)
            return int(failed > 0)
        counts = run_folder(model, task, found, out, on_record=show, **given)
    broken = f" (named in {out.with_suffix('.failed.jsonl')})" if counts.failed else ""
    print(
        f"{out}: {counts.done} done, {counts.skipped} done before, {counts.failed} failed{broken}",
        file=sys.stderr,
    )
    return int(counts.failed > 0)
