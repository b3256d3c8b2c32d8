"""Meta-World: images, seeds, success and the scripted expert."""

import numpy as np
import pytest

pytestmark = pytest.mark.sim
pytest.importorskip("metaworld", reason='pip install "mmdlm[sim]"')

from mmdlm.simulators.metaworld import INSTRUCTIONS, MetaWorld  # noqa: E402
from mmdlm.simulators.simulator import choose_gl, open_simulator  # noqa: E402

if choose_gl() is None:
    pytest.skip("nothing renders; apt-get install libegl1 libegl-mesa0", allow_module_level=True)


@pytest.fixture(scope="module")
def button() -> MetaWorld:
    with open_simulator("metaworld/button-press-topdown-v3", size=32, horizon=120) as simulator:
        yield simulator


def test_every_task_of_the_benchmark_has_its_own_instruction():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert {f"{task}-v3" for task in INSTRUCTIONS} == set(ALL_V3_ENVIRONMENTS)
    assert len(set(INSTRUCTIONS.values())) == len(INSTRUCTIONS)
    for text in INSTRUCTIONS.values():
        assert text == " ".join(text.lower().split())
        assert text.replace(" ", "").isalpha()


def test_observations_hold_image_and_hand_only(button):
    obs = button.reset(0)
    assert set(obs) == {"image", "state", "prompt"}
    assert obs["image"].shape == (32, 32, 3)
    assert obs["image"].dtype == np.uint8
    assert obs["image"].flags.c_contiguous
    assert obs["image"].std() > 10
    assert obs["state"].shape == (4,)
    assert obs["state"].dtype == np.float32
    assert np.abs(obs["state"]).max() <= 1
    assert obs["prompt"] == "press the button from the top"


def test_image_is_upright(button):
    image = button.reset(0)["image"].astype(int)
    table, wall = image[-6:, 16:], image[:6, 16:]  # brown wood below, grey wall above
    assert (table[..., 0] - table[..., 2]).mean() > 20
    assert abs((wall[..., 0] - wall[..., 2]).mean()) < 10


def test_same_seed_gives_the_same_episode(button):
    first = button.reset(7)
    for _ in range(10):
        button.step(button.expert())
    other = button.reset(8)
    again = button.reset(7)
    assert np.array_equal(first["image"], again["image"])
    assert np.array_equal(first["state"], again["state"])
    assert not np.array_equal(first["image"], other["image"])


def test_expert_presses_the_button(button):
    for seed in range(2):
        button.reset(seed)
        success = done = False
        while not done:
            action = button.expert()
            assert action.dtype == np.float32
            assert np.abs(action).max() <= 1
            _, _, success, done = button.step(action)
        assert success
        assert button.clipped == 0


def test_idle_arm_fails_at_the_horizon():
    with MetaWorld("reach", size=16, horizon=3) as simulator:
        simulator.reset(0)
        ends = [simulator.step(np.zeros(4))[2:] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


def test_actions_move_the_hand_as_described(button):
    start = button.reset(0)["state"]
    for _ in range(10):
        obs = button.step(np.array([1.0, 0, 0, 0]))[0]
    moved = obs["state"] - start
    assert 0.05 < moved[0] < 0.12  # ten steps of at most 1 cm
    assert np.abs(moved[1:3]).max() < 0.02


@pytest.mark.slow
def test_near_quality_looks_like_the_default():
    def render(quality: str) -> np.ndarray:
        with MetaWorld("drawer-close", size=64, render_quality=quality) as simulator:
            return simulator.reset(0)["image"].astype(float)

    default = render("default")
    assert np.abs(default - render("near")).mean() < 3
    assert np.abs(default - render("fast")).mean() > 3


def test_invalid_settings_are_rejected():
    with pytest.raises(ValueError, match="render_quality is 'best'.*fast"):
        MetaWorld("reach", render_quality="best")
    with pytest.raises(ValueError, match="500"):
        MetaWorld("reach", horizon=501)


def test_two_simulators_in_one_process_render_separate_images(button):
    alone = [button.reset(1)["image"], button.step(button.expert())[0]["image"]]
    with MetaWorld("drawer-close", size=32) as other:
        drawer = other.reset(1)["image"]
        assert np.array_equal(button.reset(1)["image"], alone[0])
        assert np.array_equal(other.reset(1)["image"], drawer)
        assert np.array_equal(button.step(button.expert())[0]["image"], alone[1])
    assert np.array_equal(button.reset(1)["image"], alone[0])
