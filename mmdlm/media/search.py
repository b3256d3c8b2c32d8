"""Search files and folders for media: what is read, what fails, what is skipped and why."""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmdlm.media.files import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, check_exists, media_kind

# fmt: off
# Raw formats of cameras, which are images but have no media type in Python's table.
CAMERA_RAW = frozenset((
    ".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw",
    ".rw2",
))
# fmt: on
_TYPES = mimetypes.MimeTypes()


@dataclass
class Found:
    """What a search for media files found.

    Args:
        files: files to read, without duplicates.
        failed: what was asked for and cannot be read, with the reason: missing paths, folders
            without permission, image or audio files of types that are not supported.
        skipped: other files and folders, by reason.
    """

    files: list[Path] = field(default_factory=list)
    failed: dict[Path, Exception] = field(default_factory=dict)
    skipped: dict[str, list[Path]] = field(default_factory=dict)

    def skip(self, path: Path, reason: str) -> None:
        """Notes a path that is not read."""
        self.skipped.setdefault(reason, []).append(path)

    def summary(self) -> list[str]:
        """One line per reason, with the number of paths and the first of them."""
        lines = []
        for reason, paths in self.skipped.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines.append(f"skipped {min(paths)}{more}: {reason}")
        return lines


def search_media(
    paths: str | Path | Iterable[str | Path], kind: Literal["image", "audio"]
) -> Found:
    """Searches files and folders for files of one kind; problems do not stop the search.

    Args:
        paths: files and folders, in order. Folders are searched recursively in sorted order.
            Linked folders are searched too, each folder once. Hidden files and folders, and files
            of other types, are skipped.
        kind: the kind to list.
    Raises:
        FileNotFoundError: there are no files, and a given path does not exist.
        ValueError: `kind` is not valid; or there are no files, and a given path is of the other
            kind or a folder without files of this kind.
    """
    if kind not in ("image", "audio"):
        raise ValueError(f"search_media: kind={kind!r}, expected 'image' or 'audio'")
    given = listed(paths)
    found = Found()
    for path in given:
        try:
            _search(path, kind, found)
        except (OSError, ValueError) as error:
            found.failed[path] = error
    folders: dict[str, str] = {}
    unique: dict[str, Path] = {}
    for path in found.files:
        unique.setdefault(place(path, folders), path)
    found.files = list(unique.values())
    if not found.files and found.failed and found.failed.keys() <= set(given):
        error = next(iter(found.failed.values()))
        for line in found.summary():
            error.add_note(f"({line})")
        raise error
    return found


def find_media(
    paths: str | Path | Iterable[str | Path], kind: Literal["image", "audio"]
) -> list[Path]:
    """The files of `search_media`, where each given path has to name some.

    Args:
        paths: see `search_media`.
        kind: see `search_media`.
    Raises:
        FileNotFoundError: a given path does not exist.
        ValueError: a given path is of the other kind or a folder without files of this kind.
    """
    given = listed(paths)
    found = search_media(given, kind)
    for path in given:
        if path in found.failed:
            raise found.failed[path]
    return found.files


def listed(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """One path or several, as a list."""
    return [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def _search(path: Path, kind: Literal["image", "audio"], found: Found) -> None:
    """Adds a file or the files of a folder; raises if there is nothing to add."""
    if not path.is_dir():
        check_exists(path)
        if media_kind(path) not in (kind, None):
            raise ValueError(f"{path} is {media_kind(path)}, expected {kind}")
        found.files.append(path)
        return
    before = len(found.files) + len(found.failed)
    _walk(path, kind, found)
    if len(found.files) + len(found.failed) == before:
        known = " ".join(sorted(IMAGE_EXTENSIONS if kind == "image" else AUDIO_EXTENSIONS))
        raise ValueError(f"no {kind} in folder {path}; expected a file with {known}")


def place(path: Path, folders: dict[str, str]) -> str:
    """Absolute path with the links of its folders resolved; the file itself may be a link.

    Args:
        path: a file.
        folders: resolved folders, which is updated: most files share their folder with others.
    """
    folder, name = os.path.split(os.path.abspath(path))
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], name)


def _walk(top: Path, kind: str, found: Found) -> None:
    """Adds the files of a folder, of its subfolders, and then of linked folders."""

    def refuse(error: OSError) -> None:
        found.failed[Path(error.filename)] = error

    files: list[Path] = []
    seen: set[str] = set()
    todo = [top]
    while todo:
        start = todo.pop(0)
        real = os.path.realpath(start)
        if start is not top and (real in seen or Path(os.path.realpath(top)).is_relative_to(real)):
            found.skip(start, f"link to a folder that is searched already ({real})")
            continue
        for root, folders, names in os.walk(start, onerror=refuse):
            seen.add(os.path.realpath(root))
            for name in sorted(folders):
                if name.startswith("."):
                    found.skip(Path(root, name), "hidden folder")
                elif os.path.islink(os.path.join(root, name)):
                    todo.append(Path(root, name))
            folders[:] = [
                name
                for name in folders
                if not name.startswith(".")
                and os.path.realpath(os.path.join(root, name)) not in seen
            ]
            for name in names:
                _sort_in(Path(root, name), kind, files, found)
    found.files += sorted(files)


def _sort_in(path: Path, kind: str, files: list[Path], found: Found) -> None:
    """Adds a file of a folder to those to read, to the failed or to the skipped."""
    ending = path.suffix.lower()
    if path.name.startswith("."):
        found.skip(path, "hidden file")
    elif media_kind(path) == kind:
        files.append(path)
    elif _standard_type(path).startswith(kind) or (kind == "image" and ending in CAMERA_RAW):
        found.failed[path] = ValueError(
            f"{path} is of a type that is not supported ({ending}); convert it, for instance to "
            f"{'JPEG or PNG' if kind == 'image' else 'FLAC or WAV'}"
        )
    else:
        what = "an image" if kind == "image" else "audio"
        found.skip(path, f"not {what} ({ending or 'no extension'})")


def _standard_type(path: Path) -> str:
    """Media type by Python's own table, which is the same on every machine."""
    return _TYPES.guess_type(path.name, strict=False)[0] or ""
