"""WebDataset shards: tar files with the media and texts of a sample under one name."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mmdlm.data import chat
from mmdlm.data.conversations import Conversations, Row, exchange, files
from mmdlm.data.media_folder import MediaFolder
from mmdlm.data.records import Entry
from mmdlm.data.table import Columns
from mmdlm.media import media_kind
from mmdlm.messages import ITEM_KEYS

KEY = re.compile(r"(?P<key>(?:.*/)?[^./]+)\.(?P<extension>[^/]+)")
"""Name of a member: that of its sample up to the first dot, then what it is."""
TEXTS = ("txt", "json")


@dataclass(frozen=True)
class Member:
    """Place of a file in a tar file.

    Args:
        path: the tar file.
        name: of the file in it.
        offset: of its first byte.
        size: in bytes.
    """

    path: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The content of the file."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class WebDataset(Conversations):
    """Samples of uncompressed tar files, as written by webdataset and img2dataset.

    Members with one name up to the first dot are one sample. Images and clips are its media. The
    answer is the `.txt`. A `.json` may hold "messages", or columns as in `mmdlm.data.chat`,
    `mmdlm.data.llava` or `mmdlm.data.table`; beside a `.txt` only "messages" and "conversations" in
    it are used, since img2dataset writes its own notes there. Messages name media by the name or
    extension of their member.

    The tar files are indexed once, without unpacking: texts are read then, media when they are
    drawn. So samples are drawn in any order, by several workers, and a run resumes exactly.
    Addresses on the network cannot be streamed: download the tar files first.

    Args:
        path: a `.tar`, a pattern such as `part-{000..012}.tar`, or a folder of tar files.
        length: see `Conversations`.
        prompt: see `Conversations`.
    """

    EXAMPLE: ClassVar[str] = "shards/part-000.tar:\n0001.jpg  0001.txt\n0002.jpg  0002.json"

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Conversations.matches`."""
        if path.is_dir():
            return bool(shards(path)) and not MediaFolder.matches(path)
        return path.suffix.lower() == ".tar"

    def entries(self) -> Iterator[Entry]:
        """See `Conversations.entries`."""
        for shard in shards(self.path):
            try:
                for key, members in samples(shard):
                    yield f"{shard}, sample {key}", members
            except ValueError as error:
                yield str(shard), error

    def row(self, entry: dict[str, Member], place: str) -> Row:
        """See `Conversations.row`."""
        return sample_row(entry, place)

    def item(self, item: Any) -> Any:
        """See `Conversations.item`."""
        return item.read() if isinstance(item, Member) else super().item(item)


def shards(path: Path) -> list[Path]:
    """The tar files of a folder, sorted, or of a pattern."""
    return sorted(path.glob("*.tar")) if path.is_dir() else files(path)


def samples(shard: Path) -> Iterator[tuple[str, dict[str, Member] | ValueError]]:
    """Name and members by extension of each sample of a tar file.

    The members are a ValueError if two have the same extension.

    Raises:
        ValueError: it is not a complete, uncompressed tar file.
    """
    key, members, wrong = "", {}, None
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                found = KEY.fullmatch(info.name)
                if not info.isreg() or info.issparse() or found is None:
                    continue
                if found["key"] != key:
                    if members:
                        yield key, wrong or members
                    key, members, wrong = found["key"], {}, None
                extension = found["extension"].lower()
                if extension in members:
                    wrong = ValueError(
                        f"{shard}, sample {key} has two members {info.name}; each needs a name"
                    )
                members[extension] = Member(shard, info.name, info.offset_data, info.size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{shard} is not a complete, uncompressed tar file ({error}); unpack and write it again"
        ) from error
    if members:
        yield key, wrong or members


def sample_row(members: dict[str, Member], place: str) -> Row:
    """One sample as a row.

    Args:
        members: by extension.
        place: for errors.

    Raises:
        ValueError: it has no text, or its text is not valid.
    """
    media = [
        (kind, member)
        for extension, member in members.items()
        if (kind := media_kind(f"x.{extension}")) is not None
    ]
    texts = {kind: members[kind].read() for kind in TEXTS if kind in members}
    if not texts:
        raise ValueError(f"{place} holds {', '.join(members)}; expected a .txt or .json with it")
    try:
        notes = json.loads(texts.get("json", b"{}"))
        caption = texts["txt"].decode("utf-8-sig").strip() if "txt" in texts else None
    except ValueError as error:
        raise ValueError(f"{place} has no valid text ({error})") from error
    if not isinstance(notes, dict):
        raise ValueError(f"{place}: the .json is a {type(notes).__name__}, expected an object")
    if "messages" not in notes and "conversations" not in notes and caption is not None:
        if not media:
            raise ValueError(f"{place} has a text alone; expected an image or a clip with it")
        return exchange(media, None, caption)
    named = {m.name.rpartition("/")[2]: m for m in members.values()} | members
    used: list[Member] = []
    if "messages" in notes:
        notes = notes | {"messages": [_resolved(m, named, used) for m in notes["messages"]]}
    notes = {key: value for key, value in notes.items() if key not in chat.MEDIA}
    for kind in ("image", "audio"):
        notes[kind] = [item for k, item in media if k == kind and item not in used]
    return Columns().conversation(notes, place)


def _resolved(message: Any, named: dict[str, Member], used: list[Member]) -> Any:
    """A message with members in place of their names, which are appended to `used`."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [dict(part) if isinstance(part, dict) else part for part in message["content"]]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        for key in ITEM_KEYS.get(kind, ()):
            if isinstance(part.get(key), str) and part[key] in named:
                part[key] = named[part[key]]
                used.append(part[key])
    return {**message, "content": parts}
