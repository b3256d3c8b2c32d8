"""Statistics of another robot."""

import pytest

import mmdlm
from mmdlm.training.ranges import fits, settle


@pytest.fixture
def policy():
    return mmdlm.load("tiny", pack=False)


def moved(statistics, by):
    return {name: [value + by for value in values] for name, values in statistics.items()}


def test_equal_statistics_stay(policy):
    robot = policy.robot
    own = {"action": robot.action.statistics, "state": robot.state.statistics}
    settle(policy, own, "tiny", None)
    assert policy.robot is robot


@pytest.mark.parametrize("keep", [None, "data"])
def test_a_policy_gets_the_statistics_of_other_data(policy, capsys, caplog, keep):
    robot = policy.robot
    action = moved(robot.action.statistics, 300.0)
    with caplog.at_level("INFO"):
        settle(policy, {"action": action, "state": robot.state.statistics}, "tiny", keep)
    assert policy.robot.action.statistics == action
    assert policy.robot.action.mode == robot.action.mode
    assert policy.robot.state.statistics == robot.state.statistics
    high = policy.robot.action.unnormalize(policy.robot.action.normalize([[305.0] * 4][0:1][0]))
    assert high.max() > 290
    assert "tiny gets the statistics of the data: action" in caplog.text
    assert ("--model.statistics source" in caplog.text) == (keep is None)


def test_a_policy_can_keep_its_own_and_says_what_is_clipped(policy, caplog):
    robot = policy.robot
    action = moved(robot.action.statistics, 300.0)
    with caplog.at_level("INFO"):
        settle(policy, {"action": action, "state": robot.state.statistics}, "tiny", "source")
    assert policy.robot is robot
    assert "outside the range of the policy are clipped" in caplog.text


def test_states_of_another_size_are_refused(policy):
    robot = policy.robot
    state = {name: values * 2 for name, values in robot.state.statistics.items()}
    with pytest.raises(ValueError, match="have 8 numbers, but the state encoder of tiny takes 4"):
        settle(policy, {"action": robot.action.statistics, "state": state}, "tiny", None)


def test_data_of_the_same_robot_keep_the_statistics(policy, caplog):
    robot = policy.robot
    own = robot.state.statistics
    middle = [(a + b) / 2 for a, b in zip(own["q01"], own["q99"], strict=True)]
    narrow = {
        name: [0.6 * value + 0.4 * m for value, m in zip(values, middle, strict=True)]
        for name, values in own.items()
    }
    gripper = {
        name: [*values[:3], 0.0 if name == "std" else 1.0]
        for name, values in robot.action.statistics.items()
    }
    with caplog.at_level("INFO"):
        settle(policy, {"action": gripper, "state": narrow}, "tiny", None)
    assert policy.robot is robot
    assert "tiny keeps its own statistics" in caplog.text
    assert "--model.statistics data" in caplog.text


@pytest.mark.parametrize(
    ("low", "high", "kept"),
    [
        ([-1.0, 0.0], [1.0, 10.0], True),
        ([-1.09, 0.0], [1.0, 10.0], True),  # a little outside
        ([-1.2, 0.0], [1.0, 10.0], False),
        ([-1.0, 4.0], [1.0, 6.0], True),
        ([-1.0, 4.5], [1.0, 6.0], False),  # they would share a few tokens
        ([1.0, 3.0], [1.0, 10.0], True),  # constant
        ([2.0, 3.0], [2.0, 10.0], False),
        ([-1.0], [1.0], False),
    ],
)
def test_ranges_that_fit(low, high, kept):
    own = {"q01": [-1.0, 0.0], "q99": [1.0, 10.0]}
    assert fits(own, {"q01": low, "q99": high}) == kept
