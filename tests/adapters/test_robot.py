"""A robot's units to token ids and back, and statistics that travel or do not fit."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapters.action_bins import ActionBins
from adapters.normalize import Normalizer
from adapters.robot import Robot

LOW, HIGH = np.array([-3.0, 0.5, -0.01]), np.array([5.0, 0.75, 0.02])
BINS = 33


def robot(last_id=200, reverse=False):
    action = {"q01": LOW.tolist(), "q99": HIGH.tolist()}
    state = {"q01": [-2.0] * 4, "q99": [2.0, 2.0, 4.0, 8.0]}
    bins = ActionBins(BINS, last_id=last_id, reverse=reverse)
    return Robot(bins, Normalizer(action), Normalizer(state), chunk=5)


def chunk(seed=0):
    return np.random.default_rng(seed).uniform(LOW, HIGH, (5, 3)).astype(np.float32)


@pytest.mark.parametrize("reverse", [False, True])
def test_actions_come_back_within_half_a_bin(reverse):
    made, actions = robot(reverse=reverse), chunk()
    ids = made.encode(actions)
    assert ids.dtype == torch.int64
    assert ids.shape == (made.length,) == (15,)
    assert made.ids == range(200 - BINS + 1, 201)
    assert all(i in made.ids for i in ids.tolist())
    back = made.decode(ids)
    assert back.dtype == np.float32
    assert back.shape == (5, 3)
    half = (HIGH - LOW) / (BINS - 1) / 2
    assert (abs(back - actions) <= half * (1 + 1e-4)).all()
    assert torch.equal(made.encode(back), ids)


def test_a_tail_follows_the_actions_and_is_dropped():
    plain = robot()
    made = replace(plain, tail=(12, 11), dataset="toy")
    ids = made.encode(chunk())
    assert (made.length, made.ids) == (17, None)
    assert ids.tolist() == [*plain.encode(chunk()).tolist(), 12, 11]
    expected = plain.decode(ids[:15])
    assert np.array_equal(made.decode(ids), expected)
    ids[-2:] = 200  # whatever stands there
    assert np.array_equal(made.decode(ids), expected)
    again = Robot.from_dict(json.loads(json.dumps(made.to_dict())))
    assert (again.tail, again.dataset) == ((12, 11), "toy")
    with pytest.raises(ValueError, match=r"expected integers \[\.\.\. 15\]"):
        made.decode(ids[:15])


def test_statistics_of_the_first_edition_are_read():
    saved = robot().to_dict()
    del saved["tail"], saved["dataset"]
    assert Robot.from_dict(saved).to_dict() == robot().to_dict()


def test_actions_beyond_the_statistics_end_at_the_outermost_bins():
    made = robot()
    wide = np.stack([LOW - 9, HIGH + 9, LOW, HIGH, LOW]).astype(np.float32)
    back = made.decode(made.encode(wide))
    half = (HIGH - LOW) / (BINS - 1) / 2
    np.testing.assert_allclose(back[0], LOW + half, rtol=1e-4)
    np.testing.assert_allclose(back[1], HIGH - half, rtol=1e-4)


@pytest.mark.parametrize("shape", [(4, 3), (5, 2), (15,), (1, 5, 3)])
def test_chunks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[5, 3\]; give the data set and the model"):
        robot().encode(np.zeros(shape, np.float32))


def test_actions_that_are_not_finite_are_refused():
    actions = chunk()
    actions[2, 1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        robot().encode(actions)


def test_ids_that_are_no_actions_are_refused():
    made = robot()
    ids = made.encode(chunk())
    with pytest.raises(ValueError, match=r"expected integers \[\.\.\. 15\]"):
        made.decode(ids[:-1])
    ids[3] = made.ids.stop
    with pytest.raises(ValueError, match="1 ids are not actions, the first is 201"):
        made.decode(ids)


def test_state_is_brought_to_its_range():
    state = robot().normalize_state(np.array([-2, 2, 1, 8]))
    assert state.dtype == torch.float32
    assert state.tolist() == pytest.approx([-1, 1, 0, 1])
    assert torch.equal(robot().normalize_state([-2.0, 2.0, 1.0, 8.0]), state)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_state_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity; check the robot's sensors"):
        robot().normalize_state(np.array([0, bad, 0, 0]))


def test_state_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\[3\].*4 dimensions"):
        robot().normalize_state(np.zeros(3))


@pytest.mark.parametrize("reverse", [False, True])
def test_statistics_travel_through_json(reverse):
    made = robot(last_id=90, reverse=reverse)
    again = Robot.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again.to_dict() == made.to_dict()
    assert torch.equal(again.encode(chunk()), made.encode(chunk()))
    assert np.array_equal(again.decode(made.encode(chunk())), made.decode(made.encode(chunk())))
    state = np.array([0.1, 0.2, 0.3, 0.4])
    assert torch.equal(again.normalize_state(state), made.normalize_state(state))
    assert (again.chunk, again.ids) == (made.chunk, made.ids)


@pytest.mark.parametrize("name", ["chunk", "bins", "action", "state"])
def test_missing_entries_are_named(name):
    saved = robot().to_dict()
    del saved[name]
    with pytest.raises(KeyError, match=f"lacks .*{name}"):
        Robot.from_dict(saved)


@pytest.mark.parametrize("name", ["bins", "low", "high", "last_id", "reverse"])
def test_missing_entries_of_the_bins_are_named(name):
    saved = robot().to_dict()
    del saved["bins"][name]
    with pytest.raises(KeyError, match=f"lacks .*{name}"):
        Robot.from_dict(saved)
