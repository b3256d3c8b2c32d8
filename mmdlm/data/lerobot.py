"""Reader of LeRobotDataset v3.0, v2.1 and v2.0 folders, without the `lerobot` package.

Parquet files are read with pyarrow, mp4 with PyAV. `lerobot_writer` writes. Format:
huggingface/lerobot: src/lerobot/datasets.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdlm.data import lerobot_v2
from mmdlm.files import read_json
from mmdlm.media import read_image

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pyarrow as pa


@dataclass(frozen=True)
class Episode:
    """Location of one episode: frames `start` to `stop` (half-open) of the data set."""

    index: int
    start: int
    stop: int
    tasks: tuple[str, ...]
    row: dict[str, Any]


class LeRobot:
    """A LeRobotDataset folder of version 2 or 3, read frame by frame or column by column.

    Numbers are returned in their stored dtype, images as uint8 [Y X 3] RGB.

    Args:
        root: folder that holds `meta/info.json`.
        tolerance_s: largest difference between the time stamps of a frame and its video frame.
    Raises:
        FileNotFoundError: the folder is not a LeRobot data set.
        ValueError: the data set has another version, its metadata are not valid, or the tolerance
            is negative.
    """

    def __init__(self, root: str | Path, tolerance_s: float = 1e-4) -> None:
        if not tolerance_s >= 0:
            raise ValueError(f"LeRobot: tolerance_s is {tolerance_s}, expected 0 or more seconds")
        self.root, self.tolerance_s = Path(root), tolerance_s
        path = self.root / "meta" / "info.json"
        if not path.is_file():
            raise FileNotFoundError(f"{self.root} is not a LeRobot data set: {path} is missing")
        self.info = read_json(path)
        self.version: str | None = self.info.get("codebase_version")
        if self.version not in ("v3.0", *lerobot_v2.VERSIONS):
            raise ValueError(
                f"{self.root} has version {self.version!r}, expected 'v3.0', 'v2.1' or 'v2.0'; "
                "convert it with the scripts of lerobot"
            )
        self.is_v2 = self.version in lerobot_v2.VERSIONS
        self.fps: int = self.info["fps"]
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self.tasks = self._read_tasks()
        self.episodes = self._read_episodes()
        self._starts = [episode.start for episode in self.episodes]
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.episodes[-1].stop if self.episodes else 0

    @property
    def cameras(self) -> list[str]:
        """Names of the image and video features, in the order of info.json."""
        return [key for key, value in self.features.items() if value["dtype"] in ("image", "video")]

    def stats(self) -> dict[str, dict[str, Any]]:
        """Per feature min, max, mean, std, count and (in v3.0) quantiles, as lists."""
        if self.version == "v2.1":
            return lerobot_v2.stats(self.root)
        return read_json(self.root / "meta" / "stats.json")

    def column(self, key: str) -> np.ndarray:
        """A numeric feature of all frames, [frames ...]; a feature of shape [1] as [frames]."""
        if key not in self.features or key in self.cameras:
            numeric = sorted(set(self.features) - set(self.cameras))
            raise KeyError(f"{self.root} has no numeric feature {key!r}; it has {numeric}")
        if key not in self._columns:
            parts = [table.column(key) for table in self._tables([key])]
            values = np.concatenate([_numpy(part) for part in parts])
            dtype, shape = self.features[key]["dtype"], list(self.features[key]["shape"])
            shape = [] if shape == [1] else shape
            rows = values.size // max(1, math.prod(shape))
            if rows != len(self):
                raise ValueError(
                    f"{self.root}: {key} has {rows} rows, but the episodes have {len(self)} frames "
                    "together; a file is damaged or of another data set"
                )
            self._columns[key] = values.reshape(-1, *shape).astype(dtype, copy=False)
        return self._columns[key]

    def episode_of(self, index: int) -> Episode:
        """The episode that frame `index` belongs to."""
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} is outside the {len(self)} frames of {self.root}")
        return self.episodes[bisect.bisect_right(self._starts, index) - 1]

    def frame(self, index: int) -> dict[str, Any]:
        """Every feature of one frame, with `task` as text and images as uint8 [Y X 3]."""
        self.episode_of(index)
        found: dict[str, Any] = {}
        for key in self.features:
            found[key] = self.image(key, index) if key in self.cameras else self.column(key)[index]
        return {**found, "task": self.tasks[int(found["task_index"])]}

    def window(self, key: str, index: int, offsets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """A numeric feature at `index + offsets`, and which offsets are outside the episode.

        Args:
            key: feature name.
            index: frame.
            offsets: steps relative to the frame, for example range(8) for the next eight actions.
        Returns:
            values [H ...], clamped to the first and last frame of the episode; bool [H], True for
            offsets outside the episode.
        """
        episode = self.episode_of(index)
        wanted = index + np.asarray(offsets)
        within = np.clip(wanted, episode.start, episode.stop - 1)
        return self.column(key)[within], within != wanted

    def image(self, key: str, index: int) -> np.ndarray:
        """The image of one frame, uint8 [Y X 3] RGB."""
        return next(self.images(key, index, index + 1))

    def images(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Images of frames `start` to `stop` (half-open), uint8 [Y X 3] RGB, in order.

        Raises:
            KeyError: there is no such camera.
            ValueError: a video has no frame within the tolerance.
        """
        if key not in self.cameras:
            raise KeyError(f"{self.root} has no camera {key!r}; it has {self.cameras}")
        stop = len(self) if stop is None else stop
        begin = max(0, bisect.bisect_right(self._starts, start) - 1)
        for episode in self.episodes[begin : bisect.bisect_left(self._starts, stop)]:
            first, last = max(start, episode.start), min(stop, episode.stop)
            if first >= last:
                continue
            if self.features[key]["dtype"] == "video":
                yield from self._video_frames(key, episode, first, last)
            else:
                yield from self._stored_frames(key, episode, first, last)

    def _video_frames(
        self, key: str, episode: Episode, first: int, last: int
    ) -> Iterator[np.ndarray]:
        path = self.root / self.info["video_path"].format(
            video_key=key, **self._place(episode, f"videos/{key}")
        )
        times = self.column("timestamp")[first:last].astype(np.float64)
        times += episode.row.get(f"videos/{key}/from_timestamp", 0.0)
        yield from decode_video(path, times, self.tolerance_s)

    def _stored_frames(
        self, key: str, episode: Episode, first: int, last: int
    ) -> Iterator[np.ndarray]:
        # The files of v2 hold one episode; their "index" is wrong if others were removed.
        name, begin = ("frame_index", episode.start) if self.is_v2 else ("index", 0)
        table = parquet().read_table(
            self._data_path(episode),
            columns=[key],
            filters=[(name, ">=", first - begin), (name, "<", last - begin)],
        )
        for cell in table.column(key).to_pylist():
            data = cell["bytes"] or (self.root / cell["path"]).read_bytes()
            yield np.asarray(read_image(data))

    def _data_path(self, episode: Episode) -> Path:
        return self.root / self.info["data_path"].format(**self._place(episode, "data"))

    def _place(self, episode: Episode, kind: str) -> dict[str, int]:
        """Numbers in the path of a file of an episode."""
        if self.is_v2:
            return {key: episode.row[key] for key in ("episode_chunk", "episode_index")}
        return {key: episode.row[f"{kind}/{key}"] for key in ("chunk_index", "file_index")}

    def _tables(self, columns: list[str]) -> Iterator[pa.Table]:
        for path in dict.fromkeys(self._data_path(episode) for episode in self.episodes):
            yield parquet().read_table(path, columns=columns)

    def _read_tasks(self) -> dict[int, str]:
        if self.is_v2:
            return lerobot_v2.tasks(self.root)
        table = parquet().read_table(self.root / "meta" / "tasks.parquet")
        name = "task" if "task" in table.column_names else "__index_level_0__"
        return dict(zip(*(table.column(c).to_pylist() for c in ("task_index", name)), strict=True))

    def _read_episodes(self) -> list[Episode]:
        if self.is_v2:
            rows = lerobot_v2.episodes(self.root, self.info["chunks_size"])
        else:
            rows = self._episode_rows()
        return [
            Episode(
                row["episode_index"],
                row["dataset_from_index"],
                row["dataset_to_index"],
                tuple(row["tasks"]),
                row,
            )
            for row in rows
        ]

    def _episode_rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for path in sorted((self.root / "meta" / "episodes").glob("*/*.parquet")):
            file = parquet().ParquetFile(path)
            # Most of the file are statistics of each episode, which are not needed.
            wanted = [c for c in file.schema_arrow.names if not c.startswith("stats/")]
            rows += file.read(columns=wanted).to_pylist()
        return sorted(rows, key=lambda row: row["episode_index"])


def decode_video(
    path: str | Path, times: np.ndarray, tolerance_s: float = 1e-4
) -> Iterator[np.ndarray]:
    """Frames of a video at the given times, uint8 [Y X 3] RGB.

    Selects the frame with the nearest time stamp. Computing its index as `time * rate` is wrong in
    long files (huggingface/lerobot PR 3696).

    Args:
        path: video file.
        times: seconds from its start, ascending.
        tolerance_s: largest accepted difference of time stamps.
    Raises:
        ValueError: no frame is within the tolerance.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError('Reading videos needs the extra: pip install "mmdlm[data]"') from error
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if times[0] > 0:
            container.seek(int(max(times[0] - tolerance_s, 0) / stream.time_base), stream=stream)
        frames = ((float(f.pts * stream.time_base), f) for f in container.decode(stream))
        here, ahead = next(frames, None), next(frames, None)
        for time in times:
            while ahead is not None and abs(ahead[0] - time) <= abs(here[0] - time):
                here, ahead = ahead, next(frames, None)
            if here is None or abs(here[0] - time) > tolerance_s:
                seen = "no frame" if here is None else f"{here[0]:.6f} s"
                raise ValueError(
                    f"{path}: nearest to {time:.6f} s is {seen}, more than {tolerance_s} s away; "
                    "the video does not match the time stamps. To accept it, give a larger "
                    "tolerance_s: an argument of LeRobot and Episodes, in a training config under "
                    "init_args of the data set"
                )
            yield here[1].to_ndarray(format="rgb24")


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    import pyarrow as pa

    flat = column.combine_chunks()
    while pa.types.is_nested(flat.type):
        flat = flat.flatten()
    return flat.to_numpy(zero_copy_only=False)


def parquet() -> Any:
    """The module pyarrow.parquet; its ImportError names the extra."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('LeRobot data needs the extra: pip install "mmdlm[data]"') from error
    return pyarrow.parquet
