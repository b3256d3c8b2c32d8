"""Common Voice's TSV files: clips of many speakers with their sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from mmdlm.data.conversations import Conversations, Row, exchange
from mmdlm.data.media_folder import column
from mmdlm.data.records import Entry, entries, first


class CommonVoice(Conversations):
    """Clips with sentences as in Mozilla's Common Voice; rows are grouped by accent, if known.

    Args:
        path: `train.tsv`, `dev.tsv`, `test.tsv` or `validated.tsv` beside the folder `clips`.
        clips: folder of the clips; None: `clips` beside the file.
        length: see `Conversations`.
        prompt: see `Conversations`.
    """

    EXAMPLE: ClassVar[str] = (
        "en/train.tsv (separated by tabs):\nclient_id path sentence up_votes\n"
        "a1f3 common_voice_en_1.mp3 She said so. 2\nen/clips/common_voice_en_1.mp3"
    )

    def __init__(
        self,
        path: Path,
        clips: Path | None = None,
        length: int | None = None,
        prompt: str | None = None,
    ) -> None:
        super().__init__(path, length, prompt)
        self.root = Path(clips) if clips is not None else self.path.parent / "clips"

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Conversations.matches`."""
        if path.suffix.lower() != ".tsv" or not path.is_file():
            return False
        return {"client_id", "path", "sentence"} <= set(first(path, quotes=False))

    def entries(self) -> Iterator[Entry]:
        """See `Conversations.entries`."""
        # Sentences may hold lone quotation marks, which do not enclose anything.
        return entries(self.path, quotes=False)

    def row(self, entry: dict[str, Any], place: str) -> Row:
        """See `Conversations.row`."""
        clip, text = column(entry, ("path",), place), column(entry, ("sentence",), place)
        group = entry.get("accents") or entry.get("accent") or ""
        return {**exchange([("audio", clip)], None, text), "group": group}
