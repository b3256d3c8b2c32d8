import json
import os
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


def test_tasks_and_questions_keep_their_own_failures(model, images, tmp_path):
    out, broken = tmp_path / "out.jsonl", tmp_path / "broken.png"
    broken.write_bytes(b"")
    for question in ("is it red ?", "what is it ?"):
        assert run_folder(model, "answer", [broken, *images], out, question=question).failed == 1
    assert run_folder(model, "caption", [broken, *images], out).failed == 1
    failed = [(r["task"], r.get("question")) for r in lines(tmp_path / "out.failed.jsonl")]
    assert failed == [("answer", "is it red ?"), ("answer", "what is it ?"), ("caption", None)]
    draw(broken, 1)
    assert run_folder(model, "caption", [broken, *images], out).failed == 0
    assert len(lines(tmp_path / "out.failed.jsonl")) == 2
    broken.unlink()
    run_folder(model, "answer", images, out, question="is it red ?")
    assert [r["question"] for r in lines(tmp_path / "out.failed.jsonl")] == ["what is it ?"]
    run_folder(model, "caption", images, tmp_path / "out.txt")
    assert len(lines(tmp_path / "out.failed.jsonl")) == 1


def test_names_that_are_not_utf8_are_processed_recorded_and_recognised(model, images, tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    names = [b"caf\xe9.png", b"caf%E9.png", b"\xff\xfe.png", "caf\u00e9.png".encode(), b"a\nb.png"]
    for name, image in zip(names, images, strict=True):
        (place / os.fsdecode(name)).write_bytes(Path(image).read_bytes())
    (place / os.fsdecode(b"bad\xe9.png")).write_bytes(b"")
    out = tmp_path / "out.jsonl"
    counts = run_folder(model, "caption", place, out)
    assert (counts.done, counts.skipped, counts.failed) == (5, 0, 1)
    by_path = {record["input"]["path"]: record["text"] for record in lines(out)}
    paths = ["caf%E9.png", "caf%25E9.png", "%FF%FE.png", "caf\u00e9.png", "a\nb.png"]
    assert [by_path[f"photos/{p}"] for p in paths] == mmdlm.caption(model, images)
    assert "bad%E9.png" in lines(tmp_path / "out.failed.jsonl")[0]["error"]
    again = run_folder(model, "caption", place, out)
    assert (again.done, again.skipped, again.failed) == (0, 5, 1)


def test_files_that_vanish_or_dangle_fail_and_the_others_are_done(
    model, images, tmp_path, monkeypatch
):
    place = tmp_path / "photos"
    place.mkdir()
    for i in range(6):
        draw(place / f"{i}.png", i)
    (place / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (place / "loop.png").symlink_to(place / "loop.png")
    prepare = Processor.prepare

    def vanish(self, kind, item, several=False):
        (place / "5.png").unlink(missing_ok=True)  # after the folder was searched
        return prepare(self, kind, item, several)

    monkeypatch.setattr(Processor, "prepare", vanish)
    named = [tmp_path / "typo.png", place, images[0]]
    counts = run_folder(model, "caption", named, tmp_path / "out.jsonl", workers=1)
    assert (counts.done, counts.failed) == (6, 4)
    failed = {Path(r["file"]).stem: r["error"] for r in lines(tmp_path / "out.failed.jsonl")}
    assert failed.keys() == {"5", "dangling", "loop", "typo"}
    assert "no such file" in failed["typo"]


def test_changed_files_are_processed_again_and_replace_their_result(model, photos, tmp_path):
    out = tmp_path / "out.jsonl"
    run_folder(model, "caption", photos, out, batch_size=32)
    draw(photos / "000.png", 555)
    os.utime(photos / "001.png", (1, 1))  # a copy: other time, same content
    with pytest.warns(UserWarning, match="1 files have changed since their result.*000.png"):
        counts = run_folder(model, "caption", photos, out)
    assert (counts.done, counts.skipped) == (1, 89)
    texts = {record["file"]: record["text"] for record in lines(out)}
    assert len(lines(out)) == len(texts) == 90
    assert texts[str(photos / "000.png")] == mmdlm.caption(model, photos / "000.png")


def test_same_relative_names_in_two_places_are_two_files(model, images, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    for place in "ab":
        (tmp_path / place).mkdir()
        (tmp_path / place / "1.png").write_bytes(Path(images["ab".index(place)]).read_bytes())
        monkeypatch.chdir(tmp_path / place)
        assert run_folder(model, "caption", "1.png", out).done == 1
        assert run_folder(model, "caption", "1.png", out).skipped == 1
    assert [record["text"] for record in lines(out)] == mmdlm.caption(model, images[:2])


def test_results_of_the_first_edition_are_resumed(model, images, tmp_path):
    out = tmp_path / "out.jsonl"
    old = [{"file": file, "task": "caption", "text": "x"} for file in images[:3]]
    out.write_text("".join(json.dumps(record) + "\n" for record in old), encoding="utf-8")
    counts = run_folder(model, "caption", images, out)
    assert (counts.done, counts.skipped) == (2, 3)
    assert lines(out)[:3] == old


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"prompt": "say what is red"}, "prompt"),
        ({"length": 5}, "length"),
        ({"strategies": "one_step"}, "decoding"),
        ({"seed": 3}, "seed"),
    ],
)
def test_changed_options_are_named(model, images, tmp_path, options, name):
    out = tmp_path / "out.jsonl"
    run_folder(model, "caption", images, out)
    with pytest.raises(ValueError, match=f"5 results made with other settings: {name} was"):
        run_folder(model, "caption", images, out, **options)
    assert len(lines(out)) == 5


def test_another_model_is_named_and_redone(model, make_model, images, tmp_path):
    out, other = tmp_path / "out.jsonl", make_model(seed=5)
    run_folder(model, "caption", images, out)
    with pytest.raises(ValueError, match="other settings: model was"):
        run_folder(other, "caption", images, out)
    assert run_folder(other, "caption", images, out, redo=True).done == 5
    assert [record["text"] for record in lines(out)] == mmdlm.caption(other, images)
    assert run_folder(other, "caption", images, out, details=True, batch_size=1).skipped == 5


def test_threads_give_the_same_records_in_the_same_order(model, photos, tmp_path):
    files = []
    for workers in (1, 5):
        files.append(tmp_path / f"{workers}.jsonl")
        run_folder(model, "caption", photos, files[-1], workers=workers, batch_size=7)
    assert files[0].read_bytes() == files[1].read_bytes()
    failed = [path.with_suffix(".failed.jsonl").read_bytes() for path in files]
    assert failed[0] == failed[1]


def test_missing_library_stops_the_job(model, images, tmp_path, monkeypatch):
    def broken(self, kind, item, several=False):
        raise ImportError("no decoder")

    monkeypatch.setattr(Processor, "prepare", broken)
    with pytest.raises(ImportError, match="no decoder"):
        run_folder(model, "caption", images, tmp_path / "out.jsonl")
    monkeypatch.undo()
    assert run_folder(model, "caption", images, tmp_path / "out.jsonl").done == 5


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
