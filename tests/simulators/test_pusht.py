"""gym-pusht: images, seeds and motion of the pusher."""

import numpy as np
import pytest

pytestmark = pytest.mark.sim
pytest.importorskip("gym_pusht", reason='pip install "mmdlm[sim]"')

from mmdlm.simulators.simulator import open_simulator  # noqa: E402


def test_pusht_observes_and_moves_the_pusher():
    with open_simulator("pusht", size=48, horizon=30) as simulator:
        obs = simulator.reset(0)
        assert obs["image"].shape == (48, 48, 3)
        assert obs["image"].dtype == np.uint8
        assert obs["state"].dtype == np.float32
        assert np.array_equal(simulator.reset(0)["image"], obs["image"])
        goal = obs["state"] + [30, -30]
        for _ in range(15):
            obs, reward, success, done = simulator.step(goal)
        assert np.abs(obs["state"] - goal).max() < 3
        assert 0 <= reward <= 1
        assert (success, done) == (False, False)
        simulator.step(np.array([900.0, 0.0]))
        assert simulator.clipped == 1
        with pytest.raises(TypeError, match="no scripted expert"):
            simulator.expert()


def test_pusht_rejects_invalid_sizes():
    with pytest.raises(ValueError, match="at least 16"):
        open_simulator("pusht", size=4)
