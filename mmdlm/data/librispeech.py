"""LibriSpeech's folders: clips with a .trans.txt per chapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from mmdlm.data.conversations import Conversations, Row, exchange
from mmdlm.media import media_kind


class LibriSpeech(Conversations):
    """Clips with transcripts as in LibriSpeech.

    Every folder holds `*.trans.txt` files, whose lines are the name of a clip in that folder and
    its transcript. Rows are grouped by speaker, the first part of the name.

    Args:
        path: a folder at any level: all of it, a split, a speaker or a chapter.
        lower: write the transcripts, which are upper-case in LibriSpeech, in lower case.
        length: see `Conversations`.
        prompt: see `Conversations`.
    """

    EXAMPLE: ClassVar[str] = (
        "dev-clean/84/121123/84-121123.trans.txt:\n84-121123-0000 GO DO YOU HEAR\n"
        "dev-clean/84/121123/84-121123-0000.flac"
    )

    def __init__(
        self,
        path: Path,
        lower: bool = False,
        length: int | None = None,
        prompt: str | None = None,
    ) -> None:
        self.lower = lower
        super().__init__(path, length, prompt)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Conversations.matches`."""
        return path.is_dir() and next(path.rglob("*.trans.txt"), None) is not None

    def entries(self) -> Iterator[tuple[str, tuple[str, Path, dict[str, Path]]]]:
        """See `Conversations.entries`; (line, its file, clips by name)."""
        for table in sorted(self.path.rglob("*.trans.txt")):
            clips = {
                file.stem: file for file in table.parent.iterdir() if media_kind(file) == "audio"
            }
            lines = table.read_text(encoding="utf-8-sig").splitlines()
            for i, line in enumerate(lines):
                if line.strip():
                    yield f"{table}, line {i + 1}", (line, table, clips)

    def row(self, entry: tuple[str, Path, dict[str, Path]], place: str) -> Row:
        """See `Conversations.row`."""
        line, table, clips = entry
        name, _, text = line.strip().partition(" ")
        if not text.strip():
            raise ValueError(f"{place} is {line!r}, expected a name and a transcript")
        # A clip that does not exist is reported as such when it is read.
        clip = clips.get(name, table.parent / f"{name}.flac").relative_to(self.path)
        text = text.strip().lower() if self.lower else text.strip()
        row = exchange([("audio", str(clip))], None, text)
        return {**row, "group": name.partition("-")[0]}
