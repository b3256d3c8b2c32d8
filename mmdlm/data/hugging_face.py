"""Hugging Face data sets on disk: save_to_disk folders, parquet and arrow files, repositories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mmdlm.data.conversations import Conversations, Row, files
from mmdlm.data.media_folder import MediaFolder
from mmdlm.data.table import Columns

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

EXTENSIONS = {".parquet": "parquet", ".arrow": "arrow"}
SAVED = ("state.json", "dataset_dict.json")
"""One of these is in a folder written by save_to_disk."""
BATCH = 1000  # rows whose texts are read at once


@dataclass(frozen=True)
class Cell:
    """Place of an image or a clip in a data set: row, column, and number in a list."""

    row: int
    column: str
    number: int | None = None


class HuggingFace(Conversations):
    """Rows of a data set of the library `datasets` on this machine.

    Columns with an Image or Audio feature are the media, or binary columns the user names; their
    files are handed to the reader of all other formats and are not decoded by `datasets`. Rows may
    also have "messages" or "conversations", see `mmdlm.data.chat` and `mmdlm.data.llava`. Texts are
    read at once, media when they are drawn.

    Repositories are not streamed: download one first (`hf download --repo-type dataset NAME
    --local-dir FOLDER`) and give the folder.

    Args:
        path: a folder written by `save_to_disk`; a `.parquet` or `.arrow` file, or files with a
            range as in `part-{000..012}.parquet`; or a folder that `datasets.load_dataset` reads.
        image: column of images; None: the one with an Image feature.
        audio: column of clips; None: the one with an Audio feature.
        question: see `mmdlm.data.table.Table`.
        answer: see `mmdlm.data.table.Table`.
        system: see `mmdlm.data.table.Table`.
        split: None: the only one, or "train".
        name: configuration of a repository that has several.
        length: see `Conversations`.
        prompt: see `Conversations`.

    Raises:
        ImportError: `datasets` is not installed.
    """

    EXAMPLE: ClassVar[str] = (
        "cats/dataset_info.json, cats/state.json, cats/data-00000-of-00001.arrow\n"
        "or train-00000-of-00001.parquet, with the columns image and caption"
    )

    def __init__(
        self,
        path: Path,
        image: str | None = None,
        audio: str | None = None,
        question: str | None = None,
        answer: str | None = None,
        system: str | None = None,
        split: str | None = None,
        name: str | None = None,
        length: int | None = None,
        prompt: str | None = None,
    ) -> None:
        self.columns = Columns(image, audio, question, answer, system)
        self.split, self.name = split, name
        super().__init__(path, length, prompt)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Conversations.matches`."""
        if not path.is_dir():
            return path.suffix.lower() in EXTENSIONS
        if any((path / name).is_file() for name in SAVED):
            return True
        robots = [*path.glob("meta/info.json"), *path.glob("*/meta/info.json")]
        held = (next(path.rglob(f"*{extension}"), None) for extension in EXTENSIONS)
        return not robots and any(held) and not MediaFolder.matches(path)

    def entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """See `Conversations.entries`; also finds the columns of media."""
        whole = opened(self.path, self.split, self.name)
        kinds = {name: kind for name, one in whole.features.items() if (kind := _kind(one))}
        stored = [field.name for field in whole.data.schema if _is_stored(field.type)]
        texts = [name for name in whole.column_names if name not in stored]
        self.columns = self._with_media(kinds)
        self.media = whole.select_columns(stored).with_format("arrow")
        for start in range(0, len(whole), BATCH):
            batch = whole.with_format("arrow")[start : start + BATCH]
            counts = {name: _counts(batch.column(name)) for name in stored}
            for i, cells in enumerate(batch.select(texts).to_pylist() or [{}] * len(batch)):
                cells |= {name: _cells(start + i, name, counts[name][i]) for name in stored}
                yield f"{self.path}, row {start + i + 1}", cells

    def row(self, entry: dict[str, Any], place: str) -> Row:
        """See `Conversations.row`."""
        columns = self.columns
        if columns.answer is None and ("messages" in entry or "conversations" in entry):
            # Those formats know media by the names "image" and "audio".
            named = {kind: getattr(columns, kind) for kind in ("image", "audio")}
            media = {kind: entry.pop(name) for kind, name in named.items() if name in entry}
            return Columns().conversation(entry | media, place)
        return columns.found(entry, place).row(entry, place)

    def item(self, item: Any) -> Any:
        """See `Conversations.item`."""
        if not isinstance(item, Cell):
            return super().item(item)
        value = self.media[item.row].column(item.column)[0]
        found = (value if item.number is None else value[item.number]).as_py()
        if not isinstance(found, dict):
            return found
        return found["bytes"] if found.get("bytes") is not None else Path(found["path"])

    def _with_media(self, kinds: dict[str, str]) -> Columns:
        """The columns the user named, with those of Image and Audio features."""
        columns = self.columns
        for kind in ("image", "audio"):
            names = [name for name in kinds if kinds[name] == kind]
            if getattr(columns, kind) is None and len(names) > 1:
                raise ValueError(
                    f"{self.path} has several columns of this kind: {', '.join(names)}; name one "
                    f"with {kind}="
                )
            if getattr(columns, kind) is None and names:
                columns = replace(columns, **{kind: names[0]})
        return columns


def opened(path: Path, split: str | None = None, name: str | None = None) -> datasets.Dataset:
    """One split of a data set.

    Args:
        path: see `HuggingFace`.
        split: None: the only one, or "train".
        name: configuration.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: the files are not valid, or there is no such split, or several and none is
            "train".
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'{path} needs the library datasets: pip install "mmdlm[data]"'
        ) from error
    try:
        if not path.is_dir():
            named = [str(file) for file in files(path)]
            found = datasets.load_dataset(EXTENSIONS[path.suffix.lower()], data_files=named)
        elif any((path / file).is_file() for file in SAVED):
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path), name)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{path} is not readable by the library datasets ({cause})") from error
    if isinstance(found, datasets.Dataset):
        if split not in (None, str(found.split)):
            raise ValueError(f"{path} has no splits, but split is {split!r}; leave it out")
        return found
    wanted = split or (next(iter(found)) if len(found) == 1 else "train")
    if wanted not in found:
        raise ValueError(f"{path} has no split {wanted!r}; give split= one of {', '.join(found)}")
    return found[wanted]


def _kind(feature: Any) -> str | None:
    """Kind of media of a feature, or of the entries of a list."""
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return {"Image": "image", "Audio": "audio"}.get(type(inner).__name__)


def _is_stored(kind: pa.DataType) -> bool:
    """Whether a column holds files: bytes, structs of bytes and path, or lists of these."""
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_stored(kind.value_type)
    if pa.types.is_struct(kind):
        return {field.name for field in kind} == {"bytes", "path"}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _counts(column: pa.ChunkedArray) -> list[int | None]:
    """Number of files in each row of a column: of a list its length, else None for one file."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return [count or 0 for count in pc.list_value_length(column).to_pylist()]
    return [None if valid else 0 for valid in column.is_valid().to_pylist()]


def _cells(row: int, column: str, count: int | None) -> list[Cell]:
    return [Cell(row, column)] if count is None else [Cell(row, column, i) for i in range(count)]
