"""The motorway: seeds, views, history, the rule-based driver, collisions."""

import numpy as np
import pytest

pytestmark = pytest.mark.sim
pytest.importorskip("highway_env", reason='pip install "mmdlm[sim]"')

from mmdlm.data.episodes import record  # noqa: E402
from mmdlm.simulators.highway import PAST, VIEWS, Highway  # noqa: E402
from mmdlm.simulators.simulator import open_simulator  # noqa: E402

KEEP = np.zeros(2)


@pytest.fixture(scope="module")
def road() -> Highway:
    with open_simulator("highway", size=32, vehicles=6, cameras=VIEWS) as simulator:
        yield simulator


@pytest.fixture(scope="module")
def empty() -> Highway:
    """One other vehicle, which is passed or far away for the first steps."""
    with Highway(size=32, vehicles=1, lanes=3) as simulator:
        yield simulator


def test_observations_are_three_views_of_one_scene(road):
    obs = road.reset(3)
    assert set(obs) == {"left", "image", "right", "state", "prompt"}
    for name in ("left", "image", "right"):
        assert obs[name].shape == (32, 32, 3)
        assert obs[name].dtype == np.uint8
    # The right half of the left view is the left half of the centre, and so on.
    assert np.array_equal(obs["left"][:, 16:], obs["image"][:, :16])
    assert np.array_equal(obs["image"][:, 16:], obs["right"][:, :16])
    assert obs["state"].dtype == np.float32
    assert obs["state"][0] == pytest.approx(road.speed)


def test_views_show_where_a_vehicle_is_and_whether_it_is_slower(road):
    road.reset(0)
    other = next(v for v in road._env.road.vehicles if v is not road._ego)
    other.position, other.speed = road._ego.position + (36.0, 0.0), road.speed - 10
    slower = road._observe()["image"].astype(int)
    ego = slower[100 // 4, 16]  # 4 m per pixel
    assert min(ego[:2]) > 140 > ego[2] + 50  # yellow
    rows, columns = np.nonzero(slower[:20, :, 0] - slower[:20, :, 2] > 100)
    assert rows.mean() + 0.5 == pytest.approx((100 - 36) / 4, abs=0.6)
    assert columns.mean() + 0.5 == pytest.approx(16, abs=0.6)
    other.speed = road.speed + 10
    faster = road._observe()["image"].astype(int)
    assert (faster[rows, columns, 2] - faster[rows, columns, 0] > 100).all()


def test_seed_determines_the_episode(road):
    def played(seed: int) -> tuple:
        first = road.reset(seed)["image"]
        states = [road.step(road.expert())[0]["state"] for _ in range(6)]
        return first, np.stack(states)

    image, states = played(5)
    again, same = played(5)
    other, _ = played(6)
    assert np.array_equal(image, again)
    assert np.array_equal(states, same)
    assert not np.array_equal(image, other)


def test_actions_accelerate_and_change_the_lane(empty):
    empty.reset(1)
    before, (has_left, has_right) = empty.speed, empty.lanes_beside()
    empty.step(np.array([-4.0, 0.0]))
    assert empty.speed == pytest.approx(before - 2, abs=0.05)  # half a second
    side = 1.0 if has_right else -1.0
    assert has_left or has_right
    lane = empty._ego.lane_index[2]
    empty.step(np.array([0.0, side]))
    for _ in range(8):
        empty.step(KEEP)
    assert empty._ego.lane_index[2] == lane + side
    assert abs(empty._observe()["state"][1]) < 0.3  # in the middle of the new lane


def test_history_is_relative_to_now_at_half_seconds(empty):
    empty.reset(2)
    speed = empty.speed
    past = empty.history()
    assert len(past) == PAST
    assert past[-1][:2] == (0.0, 0.0)
    assert past[0].x == pytest.approx(-3 * speed)  # before the start: constant speed
    for _ in range(PAST):
        empty.step(np.array([-1.0, 0.0]))
    past = empty.history()
    assert [m.acceleration for m in past] == pytest.approx([-1.0] * PAST, abs=0.01)
    assert past[-1].speed == pytest.approx(speed - PAST / 2, abs=0.01)
    gone = sum((a.speed + b.speed) / 4 for a, b in zip(past, past[1:], strict=False))
    assert past[0].x == pytest.approx(-gone, rel=0.01)


def test_rule_based_driver_reaches_the_end_where_constant_speed_collides():
    with Highway(size=16, horizon=40) as road:
        ends = {}
        for name in ("rules", "expert", "constant"):
            road.reset(0)
            road.autopilot = name == "rules"
            done = success = False
            while not done:
                action = road.expert() if name == "expert" else KEEP
                obs, reward, success, done = road.step(action, observe=False)
            ends[name] = (success, road.crashed, road.failed)
            assert obs == {}
            assert 10 < road.mean_speed < 30
            assert reward == 0 if road.crashed else reward > 0.3
            assert road.clipped == 0
    assert ends["rules"] == ends["expert"] == (True, False, False)
    assert ends["constant"] == (False, True, True)


def test_the_future_is_what_the_rule_based_driver_then_does(road):
    road.reset(4)
    road.autopilot = False
    for _ in range(4):
        road.step(road.expert())
    start, before = road._ego.position.copy(), road.history()
    future = road.future(2)
    assert road.history() == before
    assert np.array_equal(road._ego.position, start)
    assert road.expert().tolist() == road.expert().tolist()
    road._ego.timer = road._ego.LANE_CHANGE_DELAY + 1
    road.autopilot = True
    for _ in range(4):
        road.step(KEEP, observe=False)
    road.autopilot = False
    assert road._ego.position - start == pytest.approx(future.waypoints[1], abs=1e-6)
    assert road.speed == pytest.approx(future.speeds[1], abs=1e-6)
    assert not future.crashed


def test_invalid_settings_are_rejected():
    with pytest.raises(ValueError, match="at least 16"):
        Highway(size=8)
    with pytest.raises(ValueError, match="lanes 0"):
        Highway(lanes=0)
    with pytest.raises(ValueError, match="'rear'. not in"):
        Highway(cameras=["image", "rear"])


def test_episodes_are_recorded_like_those_of_a_robot():
    with open_simulator("highway", size=16, horizon=6) as road:
        assert set(road.reset(0)) == {"image", "state", "prompt"}
        frames = record(road, 1000, noise=0.0, scale=0.0)
    assert frames["observation.image"].shape == (6, 16, 16, 3)
    assert frames["observation.state"].shape == (6, 3)
    assert frames["action"].shape == (6, 2)
    assert np.abs(frames["action"][:, 1]).max() <= 1
