"""The interface of simulators, on the toy, and opening simulators by name."""

import os
import subprocess
import sys

import numpy as np
import pytest

from mmdlm.simulators import simulator as base
from mmdlm.simulators.simulator import Simulator, choose_gl, open_simulator


def test_error_for_unknown_names_lists_the_nearest():
    with pytest.raises(ValueError, match="'pushd' is unknown .*pusht"):
        open_simulator("pushd")
    with pytest.raises(ValueError, match="'drawer-clos'.*did you mean drawer-close"):
        open_simulator("metaworld/drawer-clos")
    with pytest.raises(ValueError, match="needs a task"):
        open_simulator("metaworld")
    with pytest.raises(ValueError, match="has no tasks"):
        open_simulator("toy/drawer-close")


@pytest.mark.parametrize("bad", [[np.nan, 0.0], [0.0, np.inf]])
def test_actions_that_are_not_finite_are_rejected_without_a_step(bad):
    with open_simulator("toy") as toy:
        before = toy.reset(0)["state"]
        with pytest.raises(ValueError, match="NaN or infinity"):
            toy.step(np.array(bad))
        after = toy.step(np.zeros(2))[0]["state"]
        assert np.array_equal(before, after)


@pytest.mark.parametrize("shape", [(3,), (1, 2), ()])
def test_actions_of_another_shape_are_rejected(shape):
    toy = open_simulator("toy")
    toy.reset(0)
    with pytest.raises(ValueError, match=r"expected \[2\].*chunk one action"):
        toy.step(np.zeros(shape))


def test_actions_outside_the_limits_are_clipped_and_counted():
    toy, same = open_simulator("toy"), open_simulator("toy")
    toy.reset(3)
    same.reset(3)
    obs = toy.step(np.array([4.0, -0.5]))[0]
    assert toy.clipped == 1
    assert np.array_equal(obs["state"], same.step(np.array([1.0, -0.5]))[0]["state"])
    assert same.clipped == 0
    toy.reset(3)
    assert toy.clipped == 0


def test_steps_outside_an_episode_are_rejected():
    toy = open_simulator("toy", horizon=2)
    with pytest.raises(RuntimeError, match="call reset"):
        toy.step(np.zeros(2))
    with pytest.raises(RuntimeError, match="call reset"):
        toy.expert()
    toy.reset(0)
    assert [toy.step(np.zeros(2))[3] for _ in range(2)] == [False, True]
    with pytest.raises(RuntimeError, match="after 2 steps"):
        toy.step(np.zeros(2))


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True])
def test_seeds_must_be_non_negative_integers(seed):
    with pytest.raises(ValueError, match="seed"):
        open_simulator("toy").reset(seed)


def test_error_of_an_incomplete_simulator_names_the_missing_method():
    class Empty(Simulator):
        action_size, state_size, horizon = 1, 1, 1
        low, high = -np.ones(1), np.ones(1)

    with pytest.raises(TypeError, match="define _reset"):
        Empty().reset(0)
    with pytest.raises(TypeError, match="no scripted expert"):
        Empty().expert()


def test_gl_backend_of_the_environment_has_priority(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert choose_gl() == "osmesa"
    monkeypatch.delenv("MUJOCO_GL")
    assert choose_gl() in ("egl", "osmesa", "glfw", None)


def test_error_without_a_gl_backend_names_the_package(monkeypatch):
    monkeypatch.setattr(base, "choose_gl", lambda: None)
    with pytest.raises(RuntimeError, match="apt-get install libegl1") as error:
        base.use_gl()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mujoco", "platform", "told"),
    [
        ("egl", "osmesa", "MUJOCO_GL=egl and PYOPENGL_PLATFORM=osmesa contradict each other"),
        ("osmesa", "egl", "MUJOCO_GL=osmesa and PYOPENGL_PLATFORM=egl contradict each other"),
        ("", "x11", "PYOPENGL_PLATFORM=x11 does not fit 'egl'"),
        ("glfw", "", r"MUJOCO_GL=glfw: .* 'glfw' does not work \(there is no display\)"),
        ("", "osmesa", "PYOPENGL_PLATFORM=osmesa: .* 'osmesa' does not work"),
        ("off", "", "MUJOCO_GL=off: .* 'off' does not work"),
    ],
)
def test_gl_variables_that_cannot_work_are_named(monkeypatch, mujoco, platform, told):
    monkeypatch.setenv("MUJOCO_GL", mujoco)
    monkeypatch.setenv("PYOPENGL_PLATFORM", platform)
    monkeypatch.setattr(base, "gl_backends", lambda: ["egl"])
    with pytest.raises(RuntimeError, match=f"^{told}; works here: egl; unset .* or set MUJOCO_GL"):
        base.use_gl()
    assert (os.environ["MUJOCO_GL"], os.environ["PYOPENGL_PLATFORM"]) == (mujoco, platform)
    monkeypatch.setattr(base, "gl_backends", list)
    with pytest.raises(RuntimeError, match="apt-get install libegl1"):
        base.use_gl()


@pytest.mark.parametrize(
    ("mujoco", "platform", "used"),
    [("", "", "egl"), ("EGL", "", "egl"), ("", "osmesa", "osmesa"), ("egl", "egl", "egl")]
    + [("glfw", "x11", "glfw")],
)
def test_gl_variables_that_fit_are_completed(monkeypatch, mujoco, platform, used):
    monkeypatch.setenv("MUJOCO_GL", mujoco)
    monkeypatch.setenv("PYOPENGL_PLATFORM", platform)
    monkeypatch.setattr(base, "gl_backends", lambda: ["egl", "osmesa", "glfw"])
    assert base.use_gl() == os.environ["MUJOCO_GL"] == used
    assert os.environ["PYOPENGL_PLATFORM"] == (used if used != "glfw" else "x11")


@pytest.mark.skipif(sys.platform != "linux", reason="backends of Linux")
def test_a_window_needs_a_display(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert "glfw" not in base.gl_backends()
    monkeypatch.setenv("DISPLAY", ":0")
    assert base.gl_backends()[-1] == "glfw"


def test_one_number_is_an_action_of_a_robot_with_one_joint():
    class Slider(Simulator):
        action_size, state_size, horizon = 1, 1, 3
        low, high = -np.ones(1, np.float32), np.ones(1, np.float32)

        def _reset(self, seed):
            self.place = 0.0

        def _step(self, action):
            self.place += float(action[0])
            return 0.0, False

        def _observe(self):
            return {"state": np.array([self.place], np.float32)}

    slider = Slider()
    slider.reset(0)
    assert [slider.step(a)[0]["state"][0] for a in (0.5, np.float32(0.25), [0.25])] == [
        *(0.5, 0.75, 1.0),
    ]


def test_import_of_simulators_is_light_and_sets_no_environment():
    code = (
        "import os, sys; before = dict(os.environ)\n"
        "import mmdlm.simulators.metaworld, mmdlm.simulators.pusht, mmdlm.simulators.toy\n"
        "import mmdlm.simulators.highway\n"
        "assert dict(os.environ) == before\n"
        "heavy = {'mujoco', 'metaworld', 'pygame', 'OpenGL', 'gymnasium', 'highway_env'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


@pytest.mark.sim
def test_open_simulator_does_not_raise_at_exit():
    pytest.importorskip("metaworld", reason='pip install "mmdlm[sim]"')
    if choose_gl() is None:
        pytest.skip("nothing renders; apt-get install libegl1 libegl-mesa0")
    code = (
        "from mmdlm.simulators.simulator import open_simulator\n"
        "simulator = open_simulator('metaworld/reach', size=16)\n"
        "simulator.reset(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Error" not in done.stderr
