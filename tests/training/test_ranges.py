"""Statistics of another robot."""

import pytest

import mmdlm
from mmdlm.training.ranges import settle


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
