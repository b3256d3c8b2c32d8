"""Recording the toy's expert and turning its episodes into samples."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason='pip install "mmdlm[data]"')

from adapters.robot import Robot  # noqa: E402
from mmdlm.data.episodes import (  # noqa: E402
    ACTION,
    AFTER_SUCCESS,
    FIRST_SEED,
    IMAGE,
    STATE,
    Episodes,
    collect,
    jitter,
    record,
)
from mmdlm.data.lerobot import LeRobot  # noqa: E402
from mmdlm.data.lerobot_writer import Writer  # noqa: E402
from mmdlm.simulators.toy import Toy  # noqa: E402
from mmdlm.training.new_model import new_robot  # noqa: E402

PUBLISHED = Path(__file__).parents[1] / "golden" / "lerobot" / "v3_video"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("episodes")
    collect(Toy(), folder / "first", episodes=10)
    collect(Toy(), folder / "second", episodes=3, seed=5000)
    return folder


class Follower(Toy):
    """Notes what was executed."""

    def reset(self, seed):
        self.executed = []
        return super().reset(seed)

    def step(self, action):
        self.executed.append(action)
        return super().step(action)


def test_recorded_actions_are_undisturbed():
    world, disturbed, steps = Follower(), 0, 0
    for seed in range(200):
        episode = record(world, seed, noise=0.3, scale=0.7)
        executed = np.stack(world.executed)
        assert np.abs(episode[ACTION]).max() <= 1
        assert np.abs(executed).max() <= 1
        # Recorded states are the ones visited; recorded actions are the expert's answer to them.
        moved = np.clip(episode[STATE][:-1] + 0.1 * executed[:-1], -1, 1)
        np.testing.assert_allclose(episode[STATE][1:], moved, atol=1e-6)
        disturbed += int((executed != episode[ACTION]).any(-1).sum())
        steps += len(executed)
    assert disturbed / steps == pytest.approx(0.3, abs=0.04)


def test_without_noise_the_expert_is_executed_and_five_steps_follow_success():
    world = Follower()
    episode = record(world, 3, noise=0.0, scale=0.7)
    assert np.array_equal(np.stack(world.executed), episode[ACTION])
    world.reset(3)
    to_success = 1
    while not world.step(world.expert())[2]:
        to_success += 1
    assert len(episode[ACTION]) == to_success + AFTER_SUCCESS


def test_recording_is_reproducible_and_returns_none_for_failures():
    first, again = (record(Toy(), 11, 0.3, 0.7) for _ in range(2))
    assert all(np.array_equal(first[key], again[key]) for key in (IMAGE, STATE, ACTION))
    assert record(Toy(horizon=1), 11, 0.3, 0.7) is None


def test_collecting_skips_failures_and_counts_them(tmp_path):
    seen = []
    done = collect(Toy(horizon=6), tmp_path, 6, on_episode=lambda *counts: seen.append(counts))
    source = LeRobot(tmp_path)
    assert done.episodes == len(source.episodes) == 6
    assert done.failed > 0
    assert done.next_seed == FIRST_SEED + done.episodes + done.failed
    assert done.frames == len(source)
    assert len(seen) == done.episodes + done.failed
    assert seen[-1][:2] == (6, done.failed)
    assert source.stats()[ACTION]["count"] == [done.frames]


def test_collecting_raises_if_most_attempts_fail(tmp_path):
    with pytest.raises(ValueError, match="failed 20 of 20.*longer horizon"):
        collect(Toy(horizon=1), tmp_path, 1)
    with pytest.raises(ValueError, match="noise"):
        collect(Toy(), tmp_path, 1, noise=1.0)


def test_samples_hold_image_state_and_the_next_actions(root):
    data = Episodes(root / "first", chunk=4, size=32)
    source = LeRobot(root / "first")
    assert len(data) == len(source)
    for index in (0, 7, len(data) - 1):
        sample = data.sample(index, np.random.default_rng(0))
        frame = source.frame(index)
        assert np.array_equal(sample.media("image")[0], frame[IMAGE])
        assert np.array_equal(sample.media("state")[0], frame[STATE])
        (turn,) = sample.turns
        assert turn.prompt == sample.group == frame["task"]
        assert turn.answer.shape == (4, 2)
        assert turn.answer.dtype == np.float32
        assert turn.length == 8
        assert np.array_equal(turn.answer, source.window(ACTION, index, range(4))[0])


def test_chunks_end_by_repeating_the_last_action_of_their_episode(root):
    data = Episodes(root / "first", chunk=6, size=32)
    end = LeRobot(root / "first").episodes[0].stop
    answer = data.sample(end - 2, np.random.default_rng(0)).turns[0].answer
    assert np.array_equal(answer[1:], np.repeat(data.actions[end - 1 : end], 5, 0))


def test_a_folder_of_data_sets_is_one_dataset(root):
    whole, first, second = (Episodes(root, tasks=tasks) for tasks in (None, ["first"], ["second"]))
    assert len(whole) == len(first) + len(second)
    sample = whole.sample(len(first), np.random.default_rng(0))
    expected = second.sample(0, np.random.default_rng(0))
    assert np.array_equal(sample.media("image")[0], expected.media("image")[0])
    assert whole.texts(len(first)) == [turn.prompt for turn in expected.turns]
    assert whole.vocabulary() == sorted({"go", "to", "the", "disc", "red", "green", "blue"})


def test_train_and_val_share_no_episode(root):
    whole, train, val = (Episodes(root, part=part) for part in ("all", "train", "val"))
    assert len(train) + len(val) == len(whole)
    first = LeRobot(root / "first").episodes[-1]
    assert np.array_equal(
        val.actions[: first.stop - first.start], whole.actions[first.start : first.stop]
    )


def test_images_of_another_size_are_resized(root):
    data = Episodes(root / "second", size=16)
    assert data.images.shape[1:] == (16, 16, 3)


def test_augmentation_depends_only_on_the_generator(root):
    data = Episodes(root / "second", size=32, augment=True)
    plain = Episodes(root / "second", size=32)
    first, again, other = (data.sample(5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.media("image")[0], again.media("image")[0])
    assert np.array_equal(first.media("state")[0], again.media("state")[0])
    assert not np.array_equal(first.media("image")[0], other.media("image")[0])
    still = plain.sample(5, np.random.default_rng(1))
    assert first.media("state")[0].dtype == np.float32
    assert 0 < np.abs(first.media("state")[0] - still.media("state")[0]).max() < 0.2
    assert np.array_equal(first.turns[0].answer, still.turns[0].answer)
    assert np.array_equal(plain.images[5], still.media("image")[0])  # the store itself is untouched


def test_jitter_changes_only_the_brightness():
    image = np.random.default_rng(0).integers(20, 200, (64, 64, 3), np.uint8)
    factors = []
    for seed in range(40):
        other = jitter(image, np.random.default_rng(seed))
        assert other.dtype == np.uint8
        ratio = other / image
        assert ratio.max() - ratio.min() < 0.06  # one factor for all pixels, but for rounding
        factors.append(ratio.mean())
    assert 0.89 < min(factors) < 0.93
    assert 1.07 < max(factors) < 1.11


def test_statistics_describe_the_frames(root):
    data = Episodes(root)
    found = data.statistics()
    assert set(found) == {"action", "state"}
    assert set(found["state"]) == {"mean", "std", "min", "max", "q01", "q99"}
    np.testing.assert_allclose(
        found["action"]["q99"], np.quantile(data.actions, 0.99, axis=0), rtol=1e-6
    )
    np.testing.assert_allclose(found["state"]["std"], data.states.std(0), rtol=1e-4)


def test_normalizer_accepts_the_statistics(root):
    import torch

    from adapters.normalize import Normalizer

    data = Episodes(root)
    normal = Normalizer(data.statistics()["action"], "bounds").normalize(torch.tensor(data.actions))
    assert normal.min() == pytest.approx(-1, abs=1e-5)
    assert normal.max() == pytest.approx(1, abs=1e-5)


@pytest.fixture
def arm(tmp_path):
    """A data set of a one-number robot with two cameras and an unusual name of its state."""
    rng = np.random.default_rng(0)
    shapes = {"front": (8, 8, 3), "wrist": (8, 8, 3), "joint": (1,), "command": (1,)}
    frames = {key: rng.random((5, *shape), np.float32) for key, shape in shapes.items()}
    frames |= {key: (255 * frames[key]).astype(np.uint8) for key in ("front", "wrist")}
    with Writer(tmp_path, shapes, fps=10) as writer:
        writer.add_episode("open", frames)
    return tmp_path, frames


def test_several_cameras_any_state_and_one_number(arm):
    root, frames = arm
    data = Episodes(
        root, chunk=2, size=8, camera=["wrist", "front"], state="joint", action="command"
    )
    sample = data.sample(3, np.random.default_rng(0))
    first, second = sample.media("image")
    assert np.array_equal(first, frames["wrist"][3])
    assert np.array_equal(second, frames["front"][3])
    assert np.array_equal(sample.media("state")[0], frames["joint"][3])
    assert np.array_equal(sample.turns[0].answer, frames["command"][3:5])
    assert len(data.statistics()["action"]["mean"]) == 1
    augmented = Episodes(root, size=8, camera=["wrist", "front"], state="joint", action="command")
    augmented.augment = True
    changed = augmented.sample(3, np.random.default_rng(0))
    assert len(changed.media("image")) == 2
    assert not np.array_equal(changed.media("image")[1], second)


def test_without_state_or_cameras(arm, tmp_path):
    root, frames = arm
    data = Episodes(root, size=8, camera="front", state="", action="command", augment=True)
    sample = data.sample(0, np.random.default_rng(0))
    assert sample.media("state") == []
    robot = new_robot(data.statistics(), bins=16, last_id=20, chunk=8)
    assert Robot.from_dict(robot.to_dict()).state.mode == "identity"
    assert robot.decode(robot.encode(sample.turns[0].answer)).shape == (8, 1)
    with Writer(tmp_path / "blind", {"joint": (2,), "command": (1,)}, fps=10) as writer:
        writer.add_episode("open", {"joint": np.ones((3, 2)), "command": frames["command"][:3]})
    data = Episodes(tmp_path / "blind", state="joint", action="command")
    sample = data.sample(0, np.random.default_rng(0))
    assert [part.kind for message in sample.messages for part in message.parts] == ["state"]


def test_unknown_features_are_named(arm):
    root, _ = arm
    with pytest.raises(KeyError, match="no numeric feature 'observation.state'.*state=''"):
        Episodes(root, camera="front")
    with pytest.raises(ValueError, match="front.*wrist.*camera="):
        Episodes(root, state="joint")


def test_error_for_missing_data_names_the_next_step(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="collect"):
        Episodes(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"\['third'\]; it has \['first', 'second'\]"):
        Episodes(root, tasks=["third"])
    with pytest.raises(KeyError, match="no camera 'wrist'"):
        Episodes(root, camera="wrist")
    with pytest.raises(ValueError, match="part"):
        Episodes(root, part="test")
    data = Episodes(root / "second")
    with pytest.raises(IndexError, match="outside"):
        data.sample(len(data), np.random.default_rng(0))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
@pytest.mark.parametrize("is_flat", [True, False], ids=["[T]", "[T 1]"])
def test_one_number_actions_and_states_are_vectors(tmp_path, is_flat, dtype):
    shapes = {IMAGE: (16, 16, 3), STATE: (1,), ACTION: (1,)}
    numbers = np.arange(6).astype(dtype)
    numbers = numbers if is_flat else numbers[:, None]
    with Writer(tmp_path, shapes, 10) as writer:
        for _ in range(2):
            frames = {IMAGE: np.zeros((6, 16, 16, 3), np.uint8), STATE: numbers, ACTION: numbers}
            writer.add_episode("pull", frames)
    data = Episodes(tmp_path, chunk=3, size=16, augment=True)
    sample = data.sample(2, np.random.default_rng(0))
    (turn,) = sample.turns
    assert (turn.answer.dtype, turn.answer.tolist()) == (np.float32, [[2], [3], [4]])
    assert turn.length == 3
    assert sample.media("state")[0].shape == (1,)
    assert data.statistics()["action"]["max"] == [5]
    assert {name: len(values) for name, values in data.statistics()["state"].items()} == {
        **dict.fromkeys(("mean", "std", "min", "max", "q01", "q99"), 1)
    }


def test_an_expert_with_one_number_is_recorded(tmp_path):
    class Slider(Toy):
        def _observe(self):
            seen = super()._observe()
            return {**seen, "state": seen["state"][0]}

    collect(Slider(), tmp_path, episodes=1)
    assert Episodes(tmp_path, size=32).states.shape[1:] == (1,)


def test_the_tolerance_of_time_stamps_is_an_option():
    pytest.importorskip("av", reason='pip install "mmdlm[data]"')
    options = {"size": 16, "tolerance_s": 1e-9}
    with pytest.raises(ValueError, match="give a larger tolerance_s.*Episodes"):
        Episodes(PUBLISHED, **options)
    assert len(Episodes(PUBLISHED, **options | {"tolerance_s": 0.04})) == 60
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"tolerance_s is {bad}"):
            Episodes(PUBLISHED, tolerance_s=bad)
