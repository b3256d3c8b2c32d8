"""Writer of LeRobotDataset v3.0 folders with PNG images, without the `lerobot` package.

Format: huggingface/lerobot: src/lerobot/datasets. `lerobot.LeRobot` reads it.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from mmdlm.atomic import write_text
from mmdlm.data.lerobot import parquet

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
OWN = ("timestamp", "frame_index", "episode_index", "index", "task_index")
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


class Writer:
    """Writes a LeRobotDataset v3.0 folder, one whole episode at a time, images as PNG.

    Use it as a context manager. `meta/` is written at the end, so that an incomplete folder is not
    a valid data set.

    Args:
        root: folder to create; must not hold a data set.
        features: shapes of one frame by name, for example {"observation.image": (64, 64, 3),
            "action": (4,)}; three sizes: an image, one size: a float32 vector.
        fps: frames per second.
        robot_type: name of the robot in info.json.
        file_mb: size in megabytes at which a new data file is started.
    """

    def __init__(
        self,
        root: str | Path,
        features: dict[str, tuple[int, ...]],
        fps: int,
        robot_type: str = "sim",
        file_mb: int = 100,
    ) -> None:
        self.root, self.fps, self.robot_type, self.file_mb = Path(root), fps, robot_type, file_mb
        if (self.root / "meta" / "info.json").exists():
            raise FileExistsError(
                f"{self.root} already holds a data set; choose another folder or delete it"
            )
        self.features = {name: _feature(shape) for name, shape in features.items()}
        self._tasks: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._summaries: dict[str, list[np.ndarray]] = {}
        self._file, self._bytes, self._number = None, 0, -1

    def add_episode(self, task: str, frames: dict[str, np.ndarray]) -> None:
        """Appends one episode.

        Args:
            task: instruction of the episode.
            frames: one array per feature: uint8 [T Y X 3] for images, float [T S] for vectors, also
                [T] where S is 1.
        Raises:
            ValueError: a feature is missing, unknown, of another shape or length, or not finite.
        """
        frames = {
            key: values[:, None] if values.ndim == 1 and self._shape(key) == [1] else values
            for key, values in frames.items()
        }
        length = self._check(frames)
        number = self._tasks.setdefault(task, len(self._tasks))
        start = self._rows[-1]["dataset_to_index"] if self._rows else 0
        whole = {
            **frames,
            "timestamp": (np.arange(length) / self.fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, len(self._rows)),
            "index": np.arange(start, start + length),
            "task_index": np.full(length, number),
        }
        self._write(whole)
        row = {"episode_index": len(self._rows), "tasks": [task], "length": length}
        row |= {"data/chunk_index": self._number // 1000, "data/file_index": self._number % 1000}
        row |= {"dataset_from_index": start, "dataset_to_index": start + length}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for key, values in whole.items():
            part = _summary(values)
            self._summaries.setdefault(key, []).append(part)
            row |= {f"stats/{key}/{name}": value for name, value in _statistics([part]).items()}
        self._rows.append(row)

    def close(self) -> None:
        """Closes the data file and writes `meta/`.

        Raises:
            ValueError: no episode was added.
        """
        if not self._rows:
            raise ValueError(f"{self.root}: no episode was added; nothing is written")
        self._file.close()
        meta = self.root / "meta"
        episodes = meta / "episodes" / (FILE.format(chunk_index=0, file_index=0) + ".parquet")
        episodes.parent.mkdir(parents=True, exist_ok=True)
        import pyarrow as pa

        parquet().write_table(pa.Table.from_pylist(self._rows), episodes)
        parquet().write_table(_task_table(self._tasks), meta / "tasks.parquet")
        stats = {key: _statistics(parts) for key, parts in self._summaries.items()}
        write_text(meta / "stats.json", json.dumps(stats, indent=4))
        write_text(meta / "info.json", json.dumps(self._info(), indent=4))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()

    def _shape(self, key: str) -> list[int]:
        return self.features.get(key, {}).get("shape", [])

    def _check(self, frames: dict[str, np.ndarray]) -> int:
        if set(frames) != set(self.features):
            raise ValueError(
                f"episode has features {sorted(frames)}, expected {sorted(self.features)}"
            )
        lengths = {key: len(values) for key, values in frames.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"features have lengths {lengths}, expected one common length above 0")
        for key, values in frames.items():
            feature = self.features[key]
            seen = list(values.shape[1:])
            if seen != feature["shape"]:
                raise ValueError(f"{key} has shape {seen} per frame, expected {feature['shape']}")
            if feature["dtype"] == "image" and values.dtype != np.uint8:
                raise ValueError(f"{key} is {values.dtype}, expected uint8 images")
            if feature["dtype"] == "float32" and not np.isfinite(values).all():
                raise ValueError(f"{key} contains NaN or infinity; drop the episode")
        return next(iter(lengths.values()))

    def _write(self, frames: dict[str, np.ndarray]) -> None:
        import pyarrow as pa

        columns: dict[str, Any] = {}
        for key, values in frames.items():
            if values.ndim == 4:
                cells = [{"bytes": _png(image), "path": None} for image in values]
                columns[key] = pa.array(
                    cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
                )
                self._bytes += sum(len(cell["bytes"]) for cell in cells)
            elif values.ndim == 2:
                flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
                columns[key] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
            else:
                columns[key] = pa.array(values)
        table = pa.table(columns)
        if self._file is None or self._bytes > self.file_mb * 2**20:
            self._next_file(table.schema)
        self._file.write_table(table)  # one row group per episode

    def _next_file(self, schema: pa.Schema) -> None:
        if self._file is not None:
            self._file.close()
        self._number, self._bytes = self._number + 1, 0
        place = FILE.format(chunk_index=self._number // 1000, file_index=self._number % 1000)
        path = self.root / "data" / (place + ".parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = parquet().ParquetWriter(path, schema)

    def _info(self) -> dict[str, Any]:
        own = {key: {"dtype": "int64", "shape": [1], "names": None} for key in OWN}
        own["timestamp"]["dtype"] = "float32"
        return {
            "codebase_version": "v3.0",
            "fps": self.fps,
            "features": self.features | own,
            "total_episodes": len(self._rows),
            "total_frames": self._rows[-1]["dataset_to_index"],
            "total_tasks": len(self._tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": self.file_mb,
            "video_files_size_in_mb": 200,
            "data_path": f"data/{FILE}.parquet",
            "video_path": None,
            "robot_type": self.robot_type,
            "splits": {"train": f"0:{len(self._rows)}"},
        }


def _feature(shape: tuple[int, ...]) -> dict[str, Any]:
    if len(shape) == 3 and shape[2] == 3:
        return {"dtype": "image", "shape": list(shape), "names": ["height", "width", "channel"]}
    if len(shape) == 1:
        return {
            "dtype": "float32",
            "shape": list(shape),
            "names": [f"{i}" for i in range(shape[0])],
        }
    raise ValueError(
        f"feature of shape {list(shape)}: expected [Y X 3] for an image or [S] for a vector"
    )


def _summary(values: np.ndarray) -> np.ndarray:
    """Sufficient data for statistics: values [T S], or for images histograms [3 256]."""
    if values.ndim == 4:
        return np.stack([np.bincount(values[..., c].ravel(), minlength=256) for c in range(3)])
    return values.reshape(len(values), -1).astype(np.float64)


def _statistics(parts: list[np.ndarray]) -> dict[str, Any]:
    """The entries of stats.json, exact over all parts; images in [0, 1], shaped [3 1 1]."""
    counts = np.sum(parts, axis=0) if parts[0].shape == (3, 256) else None
    if counts is None:
        values = np.concatenate(parts)
        found = {
            "min": values.min(0),
            "max": values.max(0),
            "mean": values.mean(0),
            "std": values.std(0),
        }
        found |= {name: np.quantile(values, q, axis=0) for name, q in QUANTILES.items()}
        return {key: value.tolist() for key, value in found.items()} | {"count": [len(values)]}
    level, share = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)
    mean = share @ level
    found = {"mean": mean, "std": np.sqrt(np.maximum(share @ level**2 - mean**2, 0))}
    below = np.cumsum(counts, 1) / counts.sum(1, keepdims=True)
    wanted = {"min": 0.0, "max": 1.0} | QUANTILES
    for name, q in wanted.items():
        reached = below > 0 if q == 0 else below >= q - 1e-12
        found[name] = level[reached.argmax(1)]
    return {key: value.reshape(3, 1, 1).tolist() for key, value in found.items()} | {
        "count": [int(counts[0].sum())]
    }


def _task_table(tasks: dict[str, int]) -> pa.Table:
    """tasks.parquet with metadata that makes the text the index in pandas, as readers expect."""
    import pyarrow as pa

    def described(name: str, kind: str, stored: str) -> dict[str, Any]:
        return {
            "name": name,
            "field_name": name,
            "pandas_type": kind,
            "numpy_type": stored,
            "metadata": None,
        }

    columns = [described("task_index", "int64", "int64"), described("task", "unicode", "object")]
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": columns,
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": list(tasks.values()), "task": list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return stream.getvalue()
