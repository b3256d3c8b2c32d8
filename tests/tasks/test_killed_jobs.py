"""A folder job that is killed, started twice, moved and changed loses and repeats nothing."""

import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmdlm
from mmdlm.lines import as_line, read_records
from mmdlm.tasks.folder import run_folder

COUNT = 600
REFUSED = 3  # exit status of a process that finds the results file locked
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*filled the canvas"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to start processes quickly"),
]


def start(job: Callable[[], object]) -> int:
    """Process id of a process that runs a job."""
    child = os.fork()
    if child:
        return child
    try:
        job()
        os._exit(0)
    except BlockingIOError:
        os._exit(REFUSED)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def wait_for(out: Path, lines: int) -> None:
    end = time.monotonic() + 60
    while count(out) < lines and time.monotonic() < end:
        time.sleep(0.002)


def records(out: Path) -> dict[str, dict]:
    """Records by file name; no file has two."""
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    by_name = {Path(record["file"]).name: record for record in found}
    assert len(by_name) == len(found)
    return by_name


def captions(model, photos: Path, **options) -> dict[str, str]:
    files = sorted(photos.iterdir())
    texts = mmdlm.caption(model, [str(file) for file in files], batch_size=64, **options)
    return dict(zip([file.name for file in files], texts, strict=True))


@pytest.fixture
def photos(tmp_path) -> Path:
    place = tmp_path / "job" / "photos"
    place.mkdir(parents=True)
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i:03d}.png")
    return place


def test_killed_doubled_moved_and_changed_jobs_lose_and_repeat_nothing(model, photos, tmp_path):
    out, rng = photos.parent / "out.jsonl", random.Random(0)
    right = captions(model, photos)
    assert len(set(right.values())) > 20

    def job(**options):
        return run_folder(model, "caption", photos, out, batch_size=8, **options)

    for _ in range(10):
        child = start(job)
        wait_for(out, count(out) + rng.randrange(5, 50))
        time.sleep(rng.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        assert status(child) == -signal.SIGKILL
    done = count(out)
    assert 50 < done < COUNT

    first = start(job)
    wait_for(out, done + 1)
    assert status(start(job)) == REFUSED
    assert status(first) == 0
    assert {name: record["text"] for name, record in records(out).items()} == right

    photos.parent.rename(tmp_path / "moved")
    photos, out = tmp_path / "moved" / "photos", tmp_path / "moved" / "out.jsonl"
    before = out.read_bytes()
    assert vars(job()) == {"done": 0, "skipped": COUNT, "failed": 0}

    prompt = "say what is left of the blue circle"
    with pytest.raises(ValueError, match=f"600 results .* is '{prompt}'.*--redo.*--keep"):
        job(prompt=prompt)
    assert vars(job(prompt=prompt, keep=True)) == {"done": 0, "skipped": COUNT, "failed": 0}
    assert out.read_bytes() == before
    child = start(lambda: job(prompt=prompt, redo=True))
    wait_for(out, COUNT + 100)
    os.kill(child, signal.SIGKILL)
    assert status(child) == -signal.SIGKILL
    counts = job(prompt=prompt, redo=True)
    assert 0 < counts.done <= COUNT - 100
    changed = captions(model, photos, prompt=prompt)
    assert changed != right
    assert {name: record["text"] for name, record in records(out).items()} == changed


def test_kills_during_the_repair_of_the_last_line_lose_nothing(tmp_path):
    out, rng = tmp_path / "out.jsonl", random.Random(1)
    whole = b"".join(as_line({"file": f"{i}.png", "text": "x" * 80}) for i in range(8_000))
    torn = b'{"file": "8000.png", "te'
    begin = time.monotonic()
    assert len(list(read(out, whole + torn))) == 8_000
    seconds = time.monotonic() - begin
    for _ in range(6):
        out.write_bytes(whole + torn)
        for _ in range(2):  # the second process repairs what the first one left
            child = start(lambda: list(read_records(out)))
            time.sleep(rng.random() * seconds * 1.2)
            os.kill(child, signal.SIGKILL)
            status(child)
            assert out.read_bytes() in (whole + torn, whole)


def read(out: Path, content: bytes):
    out.write_bytes(content)
    return read_records(out)
