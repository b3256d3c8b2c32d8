"""The toy simulator: seeds, images, instruction and expert."""

import numpy as np
import pytest

from mmdlm.simulators.toy import COLOURS, Toy


def test_observations_have_the_documented_form():
    toy = Toy(size=48)
    obs = toy.reset(0)
    assert obs["image"].shape == (48, 48, 3)
    assert obs["image"].dtype == np.uint8
    assert obs["state"].shape == (toy.state_size,)
    assert obs["state"].dtype == np.float32
    assert obs["prompt"] == toy.instruction


def test_same_seed_gives_the_same_episode():
    first, second = Toy(), Toy()
    first.reset(8)
    first.step(first.expert())
    a, b = first.reset(5), second.reset(5)
    assert a["prompt"] == b["prompt"]
    assert np.array_equal(a["image"], b["image"])
    assert not np.array_equal(a["image"], second.reset(6)["image"])


def test_expert_always_reaches_the_named_disc():
    toy = Toy()
    for seed in range(50):
        toy.reset(seed)
        success, done, steps = False, False, 0
        while not done:
            _, reward, success, done = toy.step(toy.expert())
            steps += 1
        assert success
        assert steps <= 17
        assert reward > -0.15
        assert toy.step(np.zeros(2))[2]  # success is remembered


def test_named_disc_is_drawn_in_its_colour():
    toy = Toy(size=64)
    for seed in range(20):
        image = toy.reset(seed)["image"]
        colour = toy.instruction.split()[3]
        rows, columns = np.nonzero((image == COLOURS[colour]).all(-1))
        assert len(rows) > 30
        centre = np.array([columns.mean(), rows.mean()]) / 64 * 2 - 1
        toward = toy.expert()
        state = toy._dot
        assert toward @ (centre - state) > 0


def test_invalid_sizes_are_rejected():
    with pytest.raises(ValueError, match="at least 16"):
        Toy(size=8)
