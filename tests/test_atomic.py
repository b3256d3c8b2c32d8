"""Files that are replaced as a whole, also when the disk is full or the process is killed."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from mmdlm import atomic
from mmdlm.atomic import replacing, replacing_folder, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_text(path, "one")
    assert path.read_text() == "one"
    path.chmod(0o640)
    write_text(path, "two")
    assert path.read_text() == "two"
    assert path.stat().st_mode & 0o777 == 0o640
    assert names(path.parent) == ["a.json"]


def test_new_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "one")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_writer_that_makes_a_file_of_its_own_does_not_set_the_mode(tmp_path):
    path = tmp_path / "a.safetensors"
    for mode in (0o644, 0o664):
        with replacing(path) as new:
            new.unlink()
            new.write_text("x")
            new.chmod(0o600)
        assert path.stat().st_mode & 0o777 == mode
        path.chmod(0o664)


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as new:  # noqa: PT012
        new.write_text("half")
        raise OSError(errno.ENOSPC, "full")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.ckpt"]


def test_links_are_followed(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("target", ["/dev/stdout", "/dev/fd/1"])
def test_streams_are_written_and_not_replaced(target):
    code = f"from mmdlm.atomic import write_text; print(1, flush=True); write_text({target!r}, 'x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\nx"


def test_pipes_are_written_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = f"from mmdlm.atomic import write_text; write_text({str(pipe)!r}, 'x')"
    writer = subprocess.Popen([sys.executable, "-c", code])
    assert pipe.read_text() == "x"
    assert writer.wait(60) == 0
    assert pipe.is_fifo()


KILLED = """
import os, sys
from pathlib import Path
from mmdlm import atomic
point, path = sys.argv[1], Path(sys.argv[2])
die = lambda *_: os.kill(os.getpid(), 9)
if point == "before the flush": atomic._flush = die
if point == "before the rename": os.replace = die
with atomic.replacing(path) as new:
    new.write_bytes(b"half")
    if point == "while writing": die()
    new.write_bytes(b"the new one")
"""


@pytest.mark.parametrize("point", ["while writing", "before the flush", "before the rename"])
def test_a_killed_write_leaves_the_old_file(tmp_path, point, monkeypatch):
    path = tmp_path / "last.ckpt"
    path.write_text("the old one")
    done = subprocess.run([sys.executable, "-c", KILLED, point, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "the old one"
    assert len(names(tmp_path)) == 2
    monkeypatch.setattr(atomic, "ABANDONED", 0)
    write_text(tmp_path / "other.ckpt", "next")  # another name of the same kind
    assert names(tmp_path) == ["last.ckpt", "other.ckpt"]


def test_files_that_are_being_written_are_not_leftovers(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "ABANDONED", 0)
    with replacing(tmp_path / "a.json") as outer:
        outer.write_text("outer")
        os.utime(outer, (0, 0))
        write_text(tmp_path / "b.json", "inner")
    assert (tmp_path / "a.json").read_text() == "outer"
    assert (tmp_path / "b.json").read_text() == "inner"


def test_fresh_and_foreign_hidden_files_stay(tmp_path):
    fresh, foreign = tmp_path / ".a.json.01234567.tmp", tmp_path / ".vimrc.tmp"
    for path in (fresh, foreign):
        path.write_text("mine")
    os.utime(foreign, (0, 0))
    write_text(tmp_path / "b.json", "x")
    assert names(tmp_path) == [".a.json.01234567.tmp", ".vimrc.tmp", "b.json"]
    os.utime(fresh, (time.time() - 3600,) * 2)
    write_text(tmp_path / "b.json", "x")
    assert names(tmp_path) == [".vimrc.tmp", "b.json"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_with_all_it_holds(tmp_path, monkeypatch, at_once):
    if not at_once:  # as on a system without renameat2
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda _: object())
    folder = tmp_path / "model"
    for content in ("one", "two"):
        with replacing_folder(folder) as new:
            (new / "inner").mkdir()
            (new / "inner" / content).write_text(content)
            assert not (folder / "inner" / content).exists()
    assert names(folder / "inner") == ["two"]
    assert names(tmp_path) == ["model"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), replacing_folder(folder) as new:  # noqa: PT012
        (new / "a").write_text("half")
        raise RuntimeError("stop")
    assert (folder / "a").read_text() == "old"
    assert names(tmp_path) == ["model"]
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"), replacing_folder(tmp_path / "file"):
        pass
