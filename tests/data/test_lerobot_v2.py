"""Data sets of version 2 give what the same data give in version 3."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason='pip install "mmdlm[data]"')

from mmdlm.data.episodes import Episodes  # noqa: E402
from mmdlm.data.lerobot import LeRobot  # noqa: E402
from mmdlm.data.lerobot_writer import Writer  # noqa: E402

SHAPES = {"image": (8, 8, 3), "observation.state": (3,), "action": (1,)}
DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
CHUNK = 2  # episodes per folder of the converted data


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory) -> LeRobot:
    """Three episodes in version 3."""
    root = tmp_path_factory.mktemp("third")
    rng = np.random.default_rng(0)
    with Writer(root, SHAPES, fps=10) as writer:
        for number, length in enumerate((4, 2, 5)):
            frames = {
                "image": rng.integers(0, 256, (length, 8, 8, 3), np.uint8),
                "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
                "action": rng.normal(size=(length, 1)).astype(np.float32),
            }
            writer.add_episode(f"task {number % 2}", frames)
    return LeRobot(root)


def as_second(source: LeRobot, out: Path, version: str = "v2.1", **features: dict) -> Path:
    """Writes a data set again in the layout of version 2."""
    import pyarrow.parquet as pq

    (out / "meta").mkdir(parents=True)
    whole = pq.read_table(next((source.root / "data").rglob("*.parquet")))
    lines: dict[str, list[dict]] = {"episodes": [], "episodes_stats": []}
    for episode in source.episodes:
        place = {"episode_chunk": episode.index // CHUNK, "episode_index": episode.index}
        path = out / DATA.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = whole.slice(episode.start, episode.stop - episode.start)
        pq.write_table(part.drop_columns(list(features)), path)
        number = {"episode_index": episode.index}
        length = episode.stop - episode.start
        lines["episodes"].append(number | {"tasks": list(episode.tasks), "length": length})
        values = source.column("observation.state")[episode.start : episode.stop]
        stats = {name: getattr(values, name)(0).tolist() for name in ("min", "max", "mean", "std")}
        stats["count"] = [length]
        lines["episodes_stats"].append(number | {"stats": {"observation.state": stats}})
    lines["tasks"] = [{"task_index": i, "task": task} for i, task in source.tasks.items()]
    for name, rows in lines.items():
        (out / "meta" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    info = {"codebase_version": version, "fps": source.fps, "chunks_size": CHUNK}
    info |= {"data_path": DATA, "video_path": VIDEO, "features": source.features | features}
    (out / "meta" / "info.json").write_text(json.dumps(info))
    return out


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_numbers_images_and_tasks_are_those_of_version_3(
    third: LeRobot, tmp_path: Path, version: str
) -> None:
    second = LeRobot(as_second(third, tmp_path, version))
    assert len(list((tmp_path / "data").rglob("*.parquet"))) == 3
    assert (tmp_path / "data" / "chunk-001" / "episode_000002.parquet").is_file()
    assert [(e.start, e.stop, e.tasks) for e in second.episodes] == [
        (e.start, e.stop, e.tasks) for e in third.episodes
    ]
    for index in range(len(third)):
        ours, theirs = second.frame(index), third.frame(index)
        assert ours.pop("task") == theirs.pop("task")
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    streamed, expected = (list(source.images("image", 3, 8)) for source in (second, third))
    assert np.array_equal(streamed, expected)
    windows = [source.window("action", 4, range(-1, 3)) for source in (second, third)]
    assert all(np.array_equal(a, b) for a, b in zip(*windows, strict=True))


def test_statistics_of_episodes_are_put_together(third: LeRobot, tmp_path: Path) -> None:
    found = LeRobot(as_second(third, tmp_path)).stats()["observation.state"]
    for name, values in found.items():
        np.testing.assert_allclose(values, third.stats()["observation.state"][name], atol=1e-6)


def test_a_video_per_episode(third: LeRobot, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason='pip install "mmdlm[data]"')
    feature = {"dtype": "video", "shape": [64, 64, 3], "names": ["height", "width", "channel"]}
    root = as_second(third, tmp_path, image=feature)
    for episode in third.episodes:
        place = {"episode_chunk": episode.index // CHUNK, "episode_index": episode.index}
        path = root / VIDEO.format(video_key="image", **place)
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=third.fps)
            stream.width = stream.height = 64
            for index in range(episode.start, episode.stop):
                pixels = np.full((64, 64, 3), 20 * index, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
            container.mux(stream.encode())
    levels = [image.mean() for image in LeRobot(root).images("image")]
    assert levels == pytest.approx([20 * index for index in range(len(third))], abs=4)


def test_episodes_that_were_removed_leave_the_others_in_place(
    third: LeRobot, tmp_path: Path
) -> None:
    root = as_second(third, tmp_path)
    lines = (root / "meta" / "episodes.jsonl").read_text().splitlines()
    (root / "meta" / "episodes.jsonl").write_text("\n".join([lines[2], lines[1]]))
    left = LeRobot(root)
    assert len(left) == 7
    assert np.array_equal(left.column("action"), third.column("action")[4:])
    assert np.array_equal(np.stack(list(left.images("image"))), list(third.images("image", 4)))


def test_damaged_metadata_are_named(third: LeRobot, tmp_path: Path) -> None:
    root = as_second(third, tmp_path)
    (root / "meta" / "episodes.jsonl").write_text('{"episode_index": 0, "length": 3}\n')
    with pytest.raises(ValueError, match="action has 4 rows, but the episodes have 3 frames"):
        LeRobot(root).column("action")
    (root / "meta" / "episodes.jsonl").write_text('{"episode_index": 0}\n')
    with pytest.raises(ValueError, match="episodes.jsonl, line 1 lacks length"):
        LeRobot(root)
    (root / "meta" / "tasks.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="tasks.jsonl is missing"):
        LeRobot(root)


def test_samples_for_a_policy(third: LeRobot, tmp_path: Path) -> None:
    as_second(third, tmp_path)
    given = [Episodes(root, chunk=2, size=8) for root in (tmp_path, third.root)]
    rng = np.random.default_rng(0)
    for index in range(len(given[0])):
        ours, theirs = (data.sample(index, rng) for data in given)
        assert np.array_equal(ours.turns[0].answer, theirs.turns[0].answer)
        assert ours.turns[0].answer.shape == (2, 1)
        assert np.array_equal(ours.media("image")[0], theirs.media("image")[0])
