"""Sound captions: the CSV files of Clotho and AudioCaps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from mmdlm.data.conversations import Conversations, Row, exchange
from mmdlm.data.media_folder import column
from mmdlm.data.records import SEPARATORS, Entry, entries, first
from mmdlm.media import media_kind

SPLITS = ("development", "validation", "evaluation", "train", "val", "test")
HABITS = (
    "{youtube_id}_{start_time}",
    "{youtube_id}_{start_time}.0",
    "{youtube_id}_{start}_{end}",
    "Y{youtube_id}",
    "Y{youtube_id}_{start_time}",
    "Y{youtube_id}_{start}_{end}",
    "{youtube_id}",
    "{audiocap_id}",
)
"""Names of AudioCaps' clips in common copies, without extension; start and end in milliseconds."""
SECONDS = 10  # of a clip in AudioCaps


class Clotho(Conversations):
    """Clips with five captions as in Clotho, of which each draw learns one.

    All captions of a clip are its accepted answers.

    Args:
        path: a CSV file with file_name and caption_1, caption_2, ...
        clips: folder of the clips; None: `development`, `validation` or `evaluation`, as in the
            name of the file, beside it or in `clotho_audio_files`; else its folder.
        length: see `Conversations`.
        prompt: see `Conversations`.
    """

    EXAMPLE: ClassVar[str] = (
        "clotho_captions_evaluation.csv:\nfile_name,caption_1,caption_2\n"
        "rain.wav,Rain falls on a roof.,It rains.\nevaluation/rain.wav"
    )

    TASKS: ClassVar[Mapping[str, str]] = {"audio": "describe"}

    def __init__(
        self,
        path: Path,
        clips: Path | None = None,
        length: int | None = None,
        prompt: str | None = None,
    ) -> None:
        super().__init__(path, length, prompt)
        self.root = Path(clips) if clips is not None else clip_folder(self.path)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Conversations.matches`."""
        return table_has(path, "file_name", "caption_1")

    def entries(self) -> Iterator[Entry]:
        """See `Conversations.entries`."""
        return entries(self.path)

    def row(self, entry: dict[str, Any], place: str) -> Row:
        """See `Conversations.row`."""
        found = [entry[key].strip() for key in sorted(entry) if key.startswith("caption_")]
        captions = [caption for caption in found if caption]
        if not captions:
            raise ValueError(f"{place} has no caption, expected caption_1 to caption_5")
        return exchange([("audio", column(entry, ("file_name",), place))], None, captions)


class AudioCaps(Conversations):
    """Clips with captions as in AudioCaps, one row per clip.

    All captions of a clip (five in the validation and test files) are its accepted answers, and
    each draw learns one.

    Args:
        path: a CSV file with audiocap_id, youtube_id, start_time and caption.
        clips: folder of the clips, searched with its folders; None: `train`, `val` or `test`, as in
            the name of the file, beside it; else its folder.
        name: name of a clip with {youtube_id}, {start_time}, {audiocap_id}, and {start} and {end}
            in milliseconds, with or without extension; None: the first of `HABITS` that exists.
        length: see `Conversations`.
        prompt: see `Conversations`.

    Raises:
        FileNotFoundError: no clip is found.
    """

    EXAMPLE: ClassVar[str] = (
        "val.csv:\naudiocap_id,youtube_id,start_time,caption\n97,vfY_TJq7n_U,130,Rain falls.\n"
        "val/vfY_TJq7n_U_130.wav"
    )

    TASKS: ClassVar[Mapping[str, str]] = {"audio": "describe"}

    def __init__(
        self,
        path: Path,
        clips: Path | None = None,
        name: str | None = None,
        length: int | None = None,
        prompt: str | None = None,
    ) -> None:
        self.clips, self.names = clips, HABITS if name is None else (name,)
        super().__init__(path, length, prompt)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Conversations.matches`."""
        return table_has(path, "youtube_id", "start_time", "caption")

    def entries(self) -> Iterator[Entry]:
        """See `Conversations.entries`; (place, row) of all rows of each clip."""
        self.root = Path(self.clips) if self.clips is not None else clip_folder(self.path)
        files = (file for file in sorted(self.root.rglob("*")) if media_kind(file) == "audio")
        self.found = {file.stem: str(file.relative_to(self.root)) for file in files}
        self.missing: list[str] = []
        grouped: dict[tuple[str, str], list[Entry]] = {}
        for place, row in entries(self.path):
            if isinstance(row, Exception):
                yield place, row
            else:
                grouped.setdefault((row["youtube_id"], row["start_time"]), []).append((place, row))
        for group in grouped.values():
            yield group[0][0], group
        if grouped and len(self.missing) == len(grouped):
            raise FileNotFoundError(
                f"{self.path}: {self.root} holds no clip such as {self.missing[-1]}; give the "
                "folder with clips=, and the names of the clips with name='{youtube_id}'"
            )

    def row(self, entry: list[Entry], place: str) -> Row:
        """See `Conversations.row`."""
        captions = [column(row, ("caption",), at).strip() for at, row in entry]
        stems = [stem for at, row in entry for stem in self._stems(row, at)]
        clip = next((self.found[stem] for stem in stems if stem in self.found), None)
        if clip is None:  # reported when it is read
            clip = f"{stems[0]}.wav"
            self.missing.append(clip)
        return exchange([("audio", clip)], None, captions)

    def _stems(self, row: Mapping[str, Any], place: str) -> list[str]:
        """Names that the clip of a row may have, without extension."""
        try:
            start = int(1000 * float(row["start_time"]))
            known = {**row, "start": start, "end": start + 1000 * SECONDS}
            names = [
                name.format(**known)
                for name in self.names
                if "audiocap" not in name or "audiocap_id" in row
            ]
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"{place}: {error!r} in start_time {row['start_time']!r} or name "
                f"{self.names[0]!r}; the columns are {', '.join(row)}"
            ) from error
        return [
            name if media_kind(name) is None else str(Path(name).with_suffix("")) for name in names
        ]


def clip_folder(path: Path) -> Path:
    """Folder of the clips of a CSV file: named after its split, else its own."""
    split = next((name for name in SPLITS if name in path.stem.lower()), "")
    named = (path.parent / name / split for name in ("", "clotho_audio_files", "audio", "wavs"))
    return next((folder for folder in named if split and folder.is_dir()), path.parent)


def table_has(path: Path, *names: str) -> bool:
    """Whether a CSV or TSV file has all columns."""
    if path.suffix.lower() not in SEPARATORS or not path.is_file():
        return False
    return set(names) <= set(first(path))
