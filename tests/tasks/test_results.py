import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmdlm.tasks.results import Results, failures_file


def key(record: dict) -> str:
    return (record.get("input") or {"name": record["file"]})["name"]


def results(out: Path, settings: dict | None = None, task: str = "caption", **more) -> Results:
    return Results(out, {"task": task}, settings or {"prompt": "a"}, key, **more)


def write(out: Path, names: str, settings: dict | None = None, **more) -> list[str]:
    """Adds a result for each name that is not finished; returns these names."""
    with results(out, settings, **more) as file:
        todo = [name for name in names if name not in file.finished(names)]
        for name in todo:
            file.add({"file": name, "task": file.job["task"]}, {"name": name})
    return todo


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def test_only_inputs_without_a_result_are_left(out):
    assert write(out, "abc") == ["a", "b", "c"]
    assert write(out, "abcd") == ["d"]
    assert [record["file"] for record in read(out)] == list("abcd")
    assert read(out)[0] == {
        "file": "a",
        "task": "caption",
        "input": {"name": "a"},
        "settings": {"prompt": "a"},
    }


def test_changed_settings_stop_and_name_the_change_and_the_choices(out):
    write(out, "abc", {"prompt": "a", "length": 8})
    before = out.read_bytes()
    with pytest.raises(ValueError, match="3 results.*prompt was 'a' and is 'b'") as raised:
        write(out, "abcd", {"prompt": "b", "length": 8})
    assert "--redo" in str(raised.value)
    assert "--keep" in str(raised.value)
    assert "length" not in str(raised.value)
    assert out.read_bytes() == before
    assert write(out, "d", {"prompt": "b", "length": 8}) == ["d"]  # no earlier result
    with pytest.raises(ValueError, match="exclude each other"):
        write(out, "abc", redo=True, keep=True)


def test_keep_leaves_earlier_results(out):
    write(out, "abc")
    assert write(out, "abcd", {"prompt": "b"}, keep=True) == ["d"]
    assert [record["settings"]["prompt"] for record in read(out)] == list("aaab")


def stopped(out: Path) -> None:
    """A redo that is stopped after the first of three results."""
    with results(out, {"prompt": "b"}, redo=True) as file:
        assert file.finished("abc") == {}
        file.add({"file": "a", "task": "caption"}, {"name": "a"})
        raise KeyboardInterrupt


def test_redo_replaces_earlier_results_and_resumes(out):
    write(out, "abc")
    with pytest.raises(KeyboardInterrupt):
        stopped(out)
    assert len(read(out)) == 4  # nothing is removed before the job is complete
    assert write(out, "abc", {"prompt": "b"}, redo=True) == ["b", "c"]
    assert [(r["file"], r["settings"]["prompt"]) for r in read(out)] == [
        ("a", "b"),
        ("b", "b"),
        ("c", "b"),
    ]
    assert write(out, "abc", {"prompt": "b"}, redo=True) == []


def test_lines_of_the_first_edition_are_finished_unless_redone(out):
    out.write_text('{"file": "a", "task": "caption", "text": "x"}\n')
    assert write(out, "ab") == ["b"]
    assert write(out, "ab", redo=True) == ["a"]
    assert [record["file"] for record in read(out)] == ["b", "a"]


@pytest.mark.parametrize("text", ['{"a": 1}\n', "[1]\n", '{"task": "caption"}\n', "notes\n"])
def test_files_with_something_else_are_refused_and_unchanged(out, text):
    out.write_text(text)
    with pytest.raises(ValueError, match="out.jsonl, line 1 is not"):
        write(out, "ab")
    assert out.read_text() == text


def test_lines_of_other_jobs_stay(out):
    write(out, "ab", task="answer")
    write(out, "ab")
    write(out, "ab", {"prompt": "b"}, redo=True)
    assert [r["task"] for r in read(out)] == ["answer", "answer", "caption", "caption"]


def test_second_writer_is_refused_and_a_killed_one_is_not_waited_for(out):
    code = (
        "import sys, time; from mmdlm.tasks.results import Results\n"
        "with Results(sys.argv[1], {}, {}, str): print('open', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert first.stdout.readline() == b"open\n"
    with pytest.raises(BlockingIOError, match="another job writes to .*out.jsonl"):
        write(out, "a")
    assert out.read_bytes() == b""
    first.kill()
    first.wait()
    assert write(out, "a") == ["a"]


def test_same_process_is_refused_too(out):
    with results(out), pytest.raises(BlockingIOError):
        write(out, "a")
    assert write(out, "a") == ["a"]


def test_a_link_to_the_file_stays_a_link(out, tmp_path):
    write(out, "ab")
    link = tmp_path / "sub" / "link.jsonl"
    link.parent.mkdir()
    link.symlink_to(out)
    with results(out), pytest.raises(BlockingIOError):
        write(link, "a")
    write(link, "ab", {"prompt": "b"}, redo=True)
    assert link.is_symlink()
    assert [record["settings"]["prompt"] for record in read(out)] == ["b", "b"]


def test_failures_are_kept_by_job_and_forgotten_when_tried_again(out):
    for task in ("caption", "answer"):
        with results(out, task=task) as file:
            file.finished("ab")
            for name in "ab":
                file.fail({"file": name, "task": task, "error": "E"}, {"name": name})
    assert len(read(failures_file(out))) == 4
    with results(out) as file:
        file.finished("a")
    left = [(record["task"], record["file"]) for record in read(failures_file(out))]
    assert left == [("caption", "b"), ("answer", "a"), ("answer", "b")]
    for task in ("caption", "answer"):
        write(out, "ab", task=task)
    assert not failures_file(out).exists()


def test_failures_files_of_one_stem_differ():
    names = ["a.jsonl", "a.txt", "a", "a.b.jsonl", "a.b"]
    assert failures_file(Path("x/a.jsonl")) == Path("x/a.failed.jsonl")
    assert len({failures_file(Path(name)) for name in names}) == len(names)


def test_records_that_identify_their_input_themselves(out):
    for settings in ({"n": 1}, {"n": 2}):
        with Results(out, {"task": "x"}, settings, lambda r: r["prompt"], redo=True) as file:
            assert file.finished(["hi"]) == {}
            file.add({"task": "x", "prompt": "hi"})
    assert read(out) == [{"task": "x", "prompt": "hi", "settings": {"n": 2}}]
