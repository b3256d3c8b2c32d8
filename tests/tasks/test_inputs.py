import json
import os
import shutil

import pytest

from mmdlm.tasks.inputs import Inputs


@pytest.fixture
def job(tmp_path):
    """A results file in a folder with a file below it."""
    (tmp_path / "job" / "photos").mkdir(parents=True)
    (tmp_path / "job" / "photos" / "a.png").write_bytes(b"content")
    return tmp_path / "job" / "out.jsonl"


def test_path_is_relative_to_the_results_file(job, tmp_path, monkeypatch):
    file = job.parent / "photos" / "a.png"
    source = Inputs(job).identify(file)
    assert source == {
        "path": "photos/a.png",
        "size": 7,
        "time": file.stat().st_mtime_ns // 1000,
        "digest": source["digest"],
    }
    monkeypatch.chdir(tmp_path)
    assert Inputs(tmp_path / "results" / "x.jsonl").identify(file)["path"] == "../job/photos/a.png"


@pytest.mark.parametrize(
    "name", [b"caf\xe9.png", b"100%.png", b"%E9 \xff\xfe\n.png", "é.png".encode()]
)
def test_any_name_is_recognised_from_valid_json(job, name):
    file = job.parent / "photos" / os.fsdecode(name)
    file.write_bytes(b"x")
    record = {"input": Inputs(job).identify(file)}
    text = json.dumps(record, ensure_ascii=False).encode("utf-8")
    assert Inputs(job).key_of(json.loads(text)) == str(file)
    assert len({Inputs(job).identify(f)["path"] for f in file.parent.iterdir()}) == 2


def test_every_way_to_write_a_path_is_the_same_file(job, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(job.parent)
    key = Inputs(job).key(job.parent / "photos" / "a.png")
    record = {
        "input": Inputs(tmp_path / "link" / "out.jsonl").identify(job.parent / "photos/a.png")
    }
    monkeypatch.chdir(job.parent)
    for path in ("photos/a.png", "./photos/../photos/a.png", tmp_path / "link/photos/a.png"):
        assert Inputs(job).key(path) == key
    for out in (job, tmp_path / "link" / "out.jsonl"):
        assert Inputs(out).key_of(record) == key


def test_moved_and_copied_folders_are_unchanged_and_edited_files_are_not(job, tmp_path):
    record = {"input": Inputs(job).identify(job.parent / "photos" / "a.png")}
    shutil.copytree(job.parent, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / "photos" / "a.png", (1, 1))
    job.parent.rename(tmp_path / "moved")
    for name in ("moved", "copy"):
        inputs = Inputs(tmp_path / name / "out.jsonl")
        file = tmp_path / name / "photos" / "a.png"
        assert inputs.key_of(record) == str(file)
        assert inputs.is_unchanged(file, record["input"])
        file.write_bytes(b"CONTENT")
        os.utime(file, (2, 2))
        assert not inputs.is_unchanged(file, record["input"])
        file.write_bytes(b"longer content")
        assert not inputs.is_unchanged(file, record["input"])


def test_linked_folder_below_the_results_file_moves_with_it(job, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "b.png").write_bytes(b"x")
    (job.parent / "linked").symlink_to(tmp_path / "store")
    record = {"input": Inputs(job).identify(job.parent / "linked" / "b.png")}
    job.parent.rename(tmp_path / "moved")
    inputs = Inputs(tmp_path / "moved" / "out.jsonl")
    assert inputs.key_of(record) == inputs.key(tmp_path / "moved" / "linked" / "b.png")


def test_file_that_is_gone_has_only_a_path(job):
    inputs = Inputs(job)
    gone = job.parent / "photos" / "gone.png"
    assert inputs.identify(gone) == {"path": "photos/gone.png"}
    assert not inputs.is_unchanged(gone, {"path": "photos/gone.png", "size": 1})


def test_records_of_the_first_edition_are_found_by_their_file(job, monkeypatch):
    monkeypatch.chdir(job.parent)
    key = Inputs(job).key("photos/a.png")
    assert Inputs(job).key_of({"file": "photos/a.png"}) == key
    assert Inputs(job).is_unchanged(job.parent / "photos" / "a.png", None)
