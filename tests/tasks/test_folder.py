import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmdlm
from mmdlm.processor import Processor
from mmdlm.tasks import folder
from mmdlm.tasks.folder import run_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas")


def draw(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def photos(tmp_path):
    """A hundred images, every tenth of them broken."""
    place = tmp_path / "photos"
    place.mkdir()
    for i in range(100):
        path = place / f"{i:03d}.png"
        draw(path, i)
        if i % 10 == 3:
            path.write_bytes(path.read_bytes()[:60] if i % 20 == 3 else b"")
    return place


def test_broken_files_are_recorded_and_the_others_done(model, photos, tmp_path):
    out = tmp_path / "captions.jsonl"
    counts = run_folder(model, "caption", photos, out, batch_size=32)
    assert (counts.done, counts.skipped, counts.failed) == (90, 0, 10)
    records = lines(out)
    assert len({record["file"] for record in records}) == 90
    files = [record["file"] for record in records[:5]]
    assert [record["text"] for record in records[:5]] == mmdlm.caption(model, files)
    failed = lines(tmp_path / "captions.failed.jsonl")
    assert {Path(record["file"]).stem for record in failed} == {
        f"{i:03d}" for i in range(3, 100, 10)
    }
    assert all(Path(record["file"]).name in record["error"] for record in failed)


def test_second_run_only_processes_missing_files(model, photos, tmp_path, monkeypatch):
    out = tmp_path / "captions.jsonl"
    run_folder(model, "caption", photos, out, batch_size=32)
    before = out.read_text(encoding="utf-8")
    draw(photos / "013.png", 13)  # repaired
    draw(photos / "new.png", 200)
    seen = []
    prepare = Processor.prepare
    monkeypatch.setattr(
        Processor,
        "prepare",
        lambda self, kind, item, several=False: (
            seen.append(getattr(item, "name", None)) or prepare(self, kind, item, several)
        ),
    )
    counts = run_folder(model, "caption", photos, out)
    assert (counts.done, counts.skipped, counts.failed) == (2, 90, 9)
    assert len(set(filter(None, seen))) == 11
    assert out.read_text(encoding="utf-8").startswith(before)
    assert [Path(r["file"]).name for r in lines(out)[90:]] == ["013.png", "new.png"]
    assert len(lines(tmp_path / "captions.failed.jsonl")) == 9


def test_no_failures_write_no_failures_file(model, images, tmp_path):
    out = tmp_path / "sub" / "out.jsonl"
    assert run_folder(model, "caption", images, out).failed == 0
    assert not out.with_suffix(".failed.jsonl").exists()


def test_truncated_last_line_is_redone(model, images, tmp_path):
    out = tmp_path / "out.jsonl"
    run_folder(model, "caption", images, out)
    whole = out.read_text(encoding="utf-8")
    out.write_text(whole[:-20], encoding="utf-8")
    counts = run_folder(model, "caption", images, out)
    assert (counts.done, counts.skipped) == (1, 4)
    assert out.read_text(encoding="utf-8") == whole


def test_other_file_is_not_overwritten(model, images, tmp_path):
    out = tmp_path / "notes.txt"
    out.write_text("my notes\n")
    with pytest.raises(ValueError, match="notes.txt, line 1"):
        run_folder(model, "caption", images, out)
    out.write_text("my notes")
    with pytest.raises(ValueError, match="not a results file"):
        run_folder(model, "caption", images, out)
    assert out.read_text() == "my notes"


def test_item_that_fails_its_batch_does_not_affect_the_others(model, images, tmp_path, monkeypatch):
    bad = model.processor.prepare("image", images[2]).tensor
    encode = model.encode

    def fragile(kind, items):
        if any(item.tensor.equal(bad) for item in items):
            raise RuntimeError("out of memory")
        return encode(kind, items)

    monkeypatch.setattr(model, "encode", fragile)
    out = tmp_path / "out.jsonl"
    counts = run_folder(model, "caption", images, out)
    assert (counts.done, counts.failed) == (4, 1)
    (failed,) = lines(out.with_suffix(".failed.jsonl"))
    assert failed["file"] == images[2]
    assert failed["error"].startswith("RuntimeError: out of memory")


def test_results_are_on_disk_before_the_next_batch(model, images, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    there = []
    caption = folder.caption
    monkeypatch.setattr(
        folder, "caption", lambda *a, **k: there.append(len(lines(out))) or caption(*a, **k)
    )
    run_folder(model, "caption", images, out, batch_size=2)
    assert there == [0, 2, 4]


def test_questions_share_a_results_file(model, images, tmp_path):
    out = tmp_path / "out.jsonl"
    for question in ("is it red ?", "what is it ?"):
        counts = run_folder(model, "answer", images, out, question=question, details=True)
        assert counts.done == 5
    again = run_folder(model, "answer", images, out, question="what is it ?")
    assert (again.done, again.skipped) == (0, 5)
    assert lines(out)[-1]["question"] == "what is it ?"
    assert {"tokens", "forwards", "words", "confidence", "step"} <= set(lines(out)[-1])


def test_embeddings_are_written(model, images, tmp_path):
    run_folder(model, "embed", images, tmp_path / "v.jsonl", batch_size=2)
    found = lines(tmp_path / "v.jsonl")
    assert found[3]["embedding"] == pytest.approx(
        mmdlm.embed(model, image=images[3]).tolist(), abs=1e-5
    )


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("captoin", {}, "'captoin' is unknown"),
        ("answer", {}, "question="),
        ("caption", {"question": "a ?"}, "question="),
        ("caption", {"prompt": "a dragon"}, "dragon"),
        ("caption", {"length": 0}, "length"),
        ("caption", {"strategies": "quick"}, "preset 'quick'"),
        ("describe", {}, "is image|no prompt"),
    ],
)
def test_invalid_options_fail_before_the_first_file(
    model, images, tmp_path, task, options, message
):
    out = tmp_path / "out.jsonl"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_folder(model, task, images, out, **options)
    assert not out.exists()
