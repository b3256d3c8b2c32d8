import json
import os
from pathlib import Path

import pytest

from mmdlm.lines import as_line, escape, read_records


def values(path: Path) -> list:
    return [value for _, value in read_records(path)]


def test_incomplete_last_line_is_cut_in_place(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    whole = b"".join(as_line({"n": i, "text": "caf\u00e9"}) for i in range(5))
    path.write_bytes(whole + b'{"n": 5, "te')
    inode = path.stat().st_ino
    for name in ("write_bytes", "write_text"):  # a rewritten file can be killed when it is empty
        monkeypatch.delattr(Path, name)
    assert values(path) == [{"n": i, "text": "caf\u00e9"} for i in range(5)]
    assert path.read_bytes() == whole
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("size", range(1, 60, 7))
def test_kill_at_any_byte_of_a_line_loses_only_that_line(tmp_path, size):
    path = tmp_path / "x.jsonl"
    first, second = as_line({"text": "a" * 30}), as_line({"text": "b" * 60})
    path.write_bytes(first + second[:size])
    assert values(path) == [{"text": "a" * 30}]
    path.write_bytes(path.read_bytes() + second)
    assert values(path) == [{"text": "a" * 30}, {"text": "b" * 60}]


def test_end_of_zeros_after_a_power_failure_is_cut(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"n": 1}\n' + bytes(100))
    assert values(path) == [{"n": 1}]
    assert path.read_bytes() == b'{"n": 1}\n'


@pytest.mark.parametrize("text", ["my notes", '{"n": 1}\nmy notes', "notes\nmore\n", "\xff\n"])
def test_other_files_are_refused_and_unchanged(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="x.jsonl"):
        values(path)
    assert path.read_bytes() == text.encode("latin-1")


def test_names_that_are_not_utf8_become_readable_json(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    line = as_line({"file": name, "text": "\u00e9 \U0001f600"})
    assert json.loads(line.decode("utf-8")) == {"file": "caf%E9.png", "text": "\u00e9 \U0001f600"}
    assert escape("100%.png") == "100%.png"
    assert escape("half \ud83d") == "half %ED%A0%BD"


def test_file_that_does_not_exist_has_no_lines(tmp_path):
    assert values(tmp_path / "none.jsonl") == []
    assert not (tmp_path / "none.jsonl").exists()
