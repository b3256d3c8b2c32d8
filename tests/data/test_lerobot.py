"""Reading a data set the real lerobot wrote, and reading back what our writer wrote."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason='pip install "mmdlm[data]"')

from mmdlm.data.lerobot import LeRobot, decode_video  # noqa: E402
from mmdlm.data.lerobot_writer import Writer  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden" / "lerobot"
CAMERA = "observation.images.front"


@pytest.fixture(scope="module")
def published() -> LeRobot:
    return LeRobot(GOLDEN / "v3_video")


@pytest.fixture(scope="module")
def expected() -> list[dict]:
    return json.loads((GOLDEN / "expected.json").read_text())["samples"]


def test_numbers_of_a_published_data_set_are_exact(published, expected):
    assert len(published) == 60
    assert [len(published.episodes), published.fps, published.cameras] == [3, 10, [CAMERA]]
    for sample in expected:
        index = sample["index"]["values"]
        episode = published.episode_of(index)
        assert episode.index == sample["episode_index"]["values"]
        for key in ("observation.state", "timestamp", "frame_index", "task_index"):
            value = published.column(key)[index]
            assert value.dtype == sample[key]["dtype"]
            assert np.array_equal(value, np.array(sample[key]["values"], value.dtype))
        actions, padded = published.window("action", index, range(4))
        assert np.array_equal(actions, np.array(sample["action"]["values"], np.float32))
        assert padded.tolist() == sample["action_is_pad"]["values"]


def test_frames_of_a_published_video_are_correct(published, expected):
    pytest.importorskip("av", reason='pip install "mmdlm[data]"')
    for sample in expected:
        frame = published.frame(sample["index"]["values"])
        assert frame["task"] == sample["task"]
        image = frame[CAMERA].transpose(2, 0, 1) / 255
        assert frame[CAMERA].dtype == np.uint8
        assert list(image.shape) == sample[CAMERA]["shape"]
        assert image.mean() == pytest.approx(sample[CAMERA]["mean"], abs=2e-3)
        np.testing.assert_allclose(image[:, :2, :2], sample[CAMERA]["corner"], atol=0.02)


def test_streaming_a_video_gives_the_frames_of_random_access(published):
    pytest.importorskip("av", reason='pip install "mmdlm[data]"')
    streamed = list(published.images(CAMERA, 17, 25))  # crosses from one episode to the next
    assert len(streamed) == 8
    for index, image in zip(range(17, 25), streamed, strict=True):
        assert np.array_equal(image, published.image(CAMERA, index))
    assert len({image.tobytes() for image in streamed}) == 8


def test_times_that_are_not_in_the_video_are_rejected(published):
    pytest.importorskip("av", reason='pip install "mmdlm[data]"')
    path = next((GOLDEN / "v3_video" / "videos").rglob("*.mp4"))
    with pytest.raises(ValueError, match="nearest to 0.250000 s is 0.[23]"):
        next(decode_video(path, np.array([0.25])))
    with pytest.raises(ValueError, match="does not match"):
        next(decode_video(path, np.array([1e3])))


def test_windows_stay_inside_the_episode(published):
    episode = published.episodes[1]
    values, padded = published.window("action", episode.stop - 2, range(-1, 4))
    assert padded.tolist() == [False, False, False, True, True]
    assert np.array_equal(values[3], values[2])
    first, padded = published.window("index", episode.start, [-3, 0])
    assert first.tolist() == [episode.start] * 2
    assert padded.tolist() == [True, False]


def test_unknown_names_and_versions_are_rejected(published, tmp_path):
    with pytest.raises(KeyError, match=r"no numeric feature 'state'.*observation.state"):
        published.column("state")
    with pytest.raises(KeyError, match="no camera 'wrist'.*front"):
        published.image("wrist", 0)
    with pytest.raises(IndexError, match="frame 60 is outside"):
        published.frame(60)
    with pytest.raises(FileNotFoundError, match="not a LeRobot data set"):
        LeRobot(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text('{"codebase_version": "v1.6"}')
    with pytest.raises(ValueError, match="v1.6.*convert"):
        LeRobot(tmp_path)


SHAPES = {"observation.image": (12, 16, 3), "observation.state": (3,), "action": (1,)}


def drawn(length: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "observation.image": rng.integers(0, 256, (length, 12, 16, 3), np.uint8),
        "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
        "action": rng.normal(size=(length, 1)).astype(np.float32),
    }


def test_written_data_reads_back_exactly(tmp_path):
    episodes = [drawn(length, seed) for seed, length in enumerate((5, 1, 9))]
    with Writer(tmp_path, SHAPES, fps=20, file_mb=0) as writer:  # a new file per episode
        for number, frames in enumerate(episodes):
            writer.add_episode(f"task {number % 2}", frames)
    source = LeRobot(tmp_path)
    assert len(list(tmp_path.glob("data/*/*.parquet"))) == 3
    assert [(e.start, e.stop, e.tasks) for e in source.episodes] == [
        (0, 5, ("task 0",)),
        (5, 6, ("task 1",)),
        (6, 15, ("task 0",)),
    ]
    for key in ("observation.state", "action"):
        whole = np.concatenate([frames[key] for frames in episodes])
        assert np.array_equal(source.column(key).reshape(whole.shape), whole)
    images = np.concatenate([frames["observation.image"] for frames in episodes])
    assert np.array_equal(np.stack(list(source.images("observation.image"))), images)
    frame = source.frame(7)
    assert frame["task"] == "task 0"
    assert frame["frame_index"] == 1
    assert frame["timestamp"] == np.float32(0.05)
    assert np.array_equal(frame["observation.image"], images[7])


def test_written_statistics_are_exact(tmp_path):
    episodes = [drawn(30, 0), drawn(20, 1)]
    with Writer(tmp_path, SHAPES, fps=20) as writer:
        for frames in episodes:
            writer.add_episode("push", frames)
    stats = LeRobot(tmp_path).stats()
    states = np.concatenate([frames["observation.state"] for frames in episodes]).astype(float)
    np.testing.assert_allclose(stats["observation.state"]["std"], states.std(0))
    np.testing.assert_allclose(stats["observation.state"]["q99"], np.quantile(states, 0.99, axis=0))
    images = np.concatenate([frames["observation.image"] for frames in episodes]) / 255
    found = stats["observation.image"]
    assert np.shape(found["mean"]) == (3, 1, 1)
    np.testing.assert_allclose(np.ravel(found["mean"]), images.mean((0, 1, 2)))
    np.testing.assert_allclose(np.ravel(found["std"]), images.std((0, 1, 2)))
    np.testing.assert_allclose(np.ravel(found["max"]), images.max((0, 1, 2)))
    np.testing.assert_allclose(np.ravel(found["min"]), images.min((0, 1, 2)))
    red = np.quantile(images[..., 0], 0.1)
    assert np.ravel(found["q10"])[0] == pytest.approx(red, abs=1 / 255)


def test_written_folder_has_the_layout_of_version_3(tmp_path):
    import pyarrow.parquet as pq

    with Writer(tmp_path, SHAPES, fps=20) as writer:
        writer.add_episode("push", drawn(4, 0))
    info = json.loads((tmp_path / "meta" / "info.json").read_text())
    published = json.loads((GOLDEN / "v3_video" / "meta" / "info.json").read_text())
    assert set(info) == set(published)
    assert info["data_path"] == published["data_path"]
    assert info["features"]["timestamp"] == published["features"]["timestamp"]
    path = "meta/episodes/chunk-000/file-000.parquet"
    ours, theirs = (pq.read_schema(root / path) for root in (tmp_path, GOLDEN / "v3_video"))
    shared = {name for name in theirs.names if not name.startswith(("videos/", f"stats/{CAMERA}"))}
    assert shared <= set(ours.names)
    tasks = pq.read_schema(tmp_path / "meta" / "tasks.parquet")
    assert json.loads(tasks.metadata[b"pandas"])["index_columns"] == ["task"]


def test_writer_rejects_invalid_frames(tmp_path):
    writer = Writer(tmp_path, SHAPES, fps=20)
    with pytest.raises(ValueError, match="no episode"):
        writer.close()
    frames = drawn(4, 0)
    with pytest.raises(ValueError, match="expected.*observation.state"):
        writer.add_episode("push", {"action": frames["action"]})
    with pytest.raises(ValueError, match="one common length"):
        writer.add_episode("push", {**frames, "action": frames["action"][:2]})
    with pytest.raises(ValueError, match=r"action has shape \[2\]"):
        writer.add_episode("push", {**frames, "action": np.zeros((4, 2))})
    image = frames["observation.image"] / 255
    with pytest.raises(ValueError, match="expected uint8"):
        writer.add_episode("push", {**frames, "observation.image": image})
    with pytest.raises(ValueError, match="NaN"):
        writer.add_episode("push", {**frames, "action": np.full((4, 1), np.nan)})
    with pytest.raises(ValueError, match="image or"):
        Writer(tmp_path, {"depth": (4, 4)}, fps=20)


def test_failed_writing_leaves_no_data_set(tmp_path):
    def interrupted() -> None:
        with Writer(tmp_path / "a", SHAPES, fps=20) as writer:
            writer.add_episode("push", drawn(2, 0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(FileNotFoundError):
        LeRobot(tmp_path / "a")
    with Writer(tmp_path / "a", SHAPES, fps=20) as writer:
        writer.add_episode("push", drawn(2, 0))
    with pytest.raises(FileExistsError, match="already holds"):
        Writer(tmp_path / "a", SHAPES, fps=20)
