"""Files and folders replaced as a whole: after a crash, the old or the new one is there.

The new one is written beside the old one, thus on the same file system, flushed to disk and
renamed. What a killed process left beside its target is removed by the next write there.
"""

from __future__ import annotations

import ctypes
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux, see renameat2(2)
STREAMS = ("/dev", "/dev/fd", "/proc/self/fd")  # folders of /dev/stdout and others like it
ABANDONED = 60  # seconds without a change after which an unlocked temporary file is a leftover


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields an empty file beside `path`, which replaces `path` when the block ends.

    After an error the new file is removed and `path` is unchanged. A link is followed. A device or
    a pipe, such as /dev/stdout, is yielded itself.

    Args:
        path: file to write; its folder is made.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    if str(path.parent) in STREAMS or (path.exists() and not path.is_file()):
        yield path
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    new = _beside(path)
    with _held(os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)):
        mode = (path if path.exists() else new).stat().st_mode
        try:
            yield new
            new.chmod(mode & 0o777)  # some writers, such as safetensors, make a file of their own
            _flush(new)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    _flush(path.parent)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which replaces `path` when the block ends.

    After an error the new folder is removed and `path` is unchanged. Nothing of the old folder is
    kept; copy what should stay. Where the system cannot exchange two folders at once, a crash at
    the last moment can leave the old folder under a hidden name.

    Args:
        path: folder to write; its parent folder is made.

    Raises:
        NotADirectoryError: `path` is a file.
        OSError: the folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, expected a folder to write; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    new = _beside(path)
    new.mkdir()
    with _held(os.open(new, os.O_RDONLY)):
        try:
            yield new
            for written in (*new.rglob("*"), new):
                if written.is_file() or written.is_dir():  # a pipe would wait for its other end
                    _flush(written)
            if path.exists():
                shutil.copymode(path, new)
                _exchange(new, path)
            else:
                new.rename(path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    _flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text in UTF-8 so that `path` is never half written."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def _beside(path: Path) -> Path:
    # Cut, since a file name has at most 255 bytes.
    return path.with_name(f".{path.stem[:40]}{path.suffix}.{secrets.token_hex(4)}.tmp")


def _remove_leftovers(path: Path) -> None:
    """Removes temporary files of killed processes for files of the same suffix as `path`."""
    for found in path.parent.glob(f".*{glob.escape(path.suffix)}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):
            if time.time() - found.stat().st_mtime < ABANDONED:
                continue
            with _held(os.open(found, os.O_RDONLY)) as is_free:
                if is_free:  # else another process is writing it
                    shutil.rmtree(found) if found.is_dir() else found.unlink()


@contextmanager
def _held(handle: int) -> Iterator[bool]:
    """Tries to lock an open file until it is closed; yields whether that worked.

    A lock ends with its process, so a file that can be locked is not being written.
    """
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Whether the lock of an open file could be taken."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # locked, or a system without such locks
        return False
    return True


def _flush(path: Path) -> None:
    """Forces a file or folder to disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(new: Path, old: Path) -> None:
    """Exchanges two folders, at once where the system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = (AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old))
    if rename is not None and rename(*paths, RENAME_EXCHANGE) == 0:
        return
    aside = _beside(old)
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)
