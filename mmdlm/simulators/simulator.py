"""Base class of the simulators, and `open_simulator`, which finds one by name."""

from __future__ import annotations

import ctypes
import ctypes.util
import difflib
import os
import sys
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import numpy as np

from mmdlm import discover

GL_PACKAGES = "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri   (or: libosmesa6)"

GL_VARIABLES = ("MUJOCO_GL", "PYOPENGL_PLATFORM")
OFFSCREEN = ("egl", "osmesa")  # backends for which both variables must be equal


class Simulator:
    """A robot in a world: observation in, reward and success out.

    Subclasses set the attributes below and define `_reset`, `_step`, `_observe` and, if there is
    one, `expert`. Observations are
    `{"image": uint8 [Y X 3] RGB, "state": float32 [S], "prompt": str}`.

    Attributes:
        TASKS: names of its tasks, the first argument of the class; empty if there is only one.
        instruction: the task in lower-case words.
        action_size: A.
        state_size: S.
        horizon: steps after which an episode ends without success.
        low: float32 [A], smallest action in robot units.
        high: float32 [A], largest action in robot units.
        fps: control steps per second of simulated time.
        clipped: actions of this episode that were outside the limits and were clipped.
        failed: the episode ended without success before the horizon, as by a collision; `_step`
            sets it.
    """

    TASKS: ClassVar[tuple[str, ...]] = ()

    instruction: str = ""
    action_size: int
    state_size: int
    horizon: int
    low: np.ndarray
    high: np.ndarray
    fps: int = 10
    clipped: int = 0
    failed: bool = False
    _steps: int | None = None  # None until the first reset
    _succeeded: bool = False

    def reset(self, seed: int) -> dict[str, Any]:
        """Starts the episode of a seed and returns its first observation.

        Args:
            seed: 0 or more; it determines the start and the goal.
        """
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"reset: seed is {seed!r}, expected an integer of 0 or more")
        self.clipped, self._steps, self._succeeded, self.failed = 0, 0, False, False
        self._reset(int(seed))
        return self._observe()

    def step(
        self, action: np.ndarray, observe: bool = True
    ) -> tuple[dict[str, Any], float, bool, bool]:
        """Observation, reward, success and done after one action.

        Args:
            action: float [A] in robot units; values outside the limits are clipped and counted.
            observe: return an observation. Rendering takes most of the time of a step, and a policy
                that executes several actions of a chunk needs an image only after the last one.
        Returns:
            observation, empty without `observe`; reward of this step; whether the task has been
            solved at this or any earlier step; whether the episode is over (solved, failed, or
            horizon reached). Steps after that are allowed up to the horizon.
        Raises:
            ValueError: the action is not finite or not of shape [A].
            RuntimeError: no episode is running, or the horizon has been reached.
        """
        if self._steps is None:
            raise RuntimeError("step: no episode is running; call reset(seed) first")
        if self._steps >= self.horizon:
            raise RuntimeError(
                f"step: the episode ended after {self.horizon} steps; call reset(seed)"
            )
        reward, success = self._step(self._checked(action))
        self._steps += 1
        self._succeeded = self._succeeded or bool(success)
        obs = self._observe() if observe else {}
        done = self._succeeded or self.failed or self._steps >= self.horizon
        return obs, float(reward), self._succeeded, done

    def expert(self) -> np.ndarray:
        """Action of the scripted expert in the current state, float32 [A] within the limits.

        For recording demonstrations. It may use object positions, which observations do not have.
        """
        raise TypeError(
            f"{type(self).__name__} has no scripted expert; record demonstrations elsewhere"
        )

    def settings(self) -> dict[str, Any]:
        """Further settings that a success rate depends on, in plain types."""
        return {}

    def close(self) -> None:
        """Frees the simulation; the simulator cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _checked(self, action: np.ndarray) -> np.ndarray:
        action = np.atleast_1d(np.asarray(action, dtype=np.float32))
        if action.shape != (self.action_size,):
            raise ValueError(
                f"step: action has shape {list(action.shape)}, expected [{self.action_size}]; "
                "execute a chunk one action at a time"
            )
        if not np.isfinite(action).all():
            raise ValueError(
                f"step: action {action.tolist()} contains NaN or infinity; nothing was moved"
            )
        within = np.clip(action, self.low, self.high)
        self.clipped += int((within != action).any())
        return within

    def _reset(self, seed: int) -> None:
        raise TypeError(f"{type(self).__name__} cannot start an episode; define _reset(seed)")

    def _step(self, action: np.ndarray) -> tuple[float, bool]:
        raise TypeError(f"{type(self).__name__} has no actions; define _step(action)")

    def _observe(self) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} has no observations; define _observe()")


def open_simulator(name: str, **options: Any) -> Simulator:
    """Creates a simulator.

    Args:
        name: a file of this folder ("toy", "pusht"), followed by the task where it has several
            ("metaworld/drawer-close"); a trailing "-v3" is optional.
        **options: arguments of the class (`size`, `horizon`, ...).
    Raises:
        ValueError: no simulator or task has that name; the error lists the nearest names.
    """
    family, _, task = name.partition("/")
    kind = simulator_class(name)
    if kind.TASKS and not task:
        example = f"{family}/{kind.TASKS[0]}"
        raise ValueError(f"simulator {family!r} needs a task, for example {example!r}")
    if task and not kind.TASKS:
        raise ValueError(f"simulator {family!r} has no tasks, but {name!r} names {task!r}; drop it")
    return kind(task, **options) if task else kind(**options)


def simulator_class(name: str) -> type[Simulator]:
    """The class of a simulator.

    Args:
        name: as for `open_simulator`; a task is ignored.
    Raises:
        ValueError: no simulator has that name.
    """
    family, known = name.partition("/")[0], discover.names("mmdlm.simulators")
    if family not in known:
        tasks = [task for each in known for task in simulator_class(each).TASKS]
        hint = nearest(family, [*known, *tasks])
        raise ValueError(f"simulator {name!r} is unknown{hint}; known: {', '.join(known)}")
    return discover.find("mmdlm.simulators", family)


def full_name(task: str) -> str:
    """The name of a simulator from a task alone: "drawer-close" to "metaworld/drawer-close".

    Names that `open_simulator` takes, and unknown ones, are returned unchanged.
    """
    known = discover.names("mmdlm.simulators")
    if "/" in task or task in known:
        return task
    name = task.removesuffix("-v3")
    owners = [family for family in known if name in simulator_class(family).TASKS]
    return f"{owners[0]}/{task}" if owners else task


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint " (did you mean ...?)" for a misspelt name; empty if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def choose_gl() -> str | None:
    """The OpenGL backend that MuJoCo renders with: "egl", "osmesa" or "glfw"; None for none.

    `MUJOCO_GL` in the environment has priority, then `PYOPENGL_PLATFORM`; else it is the first of
    `gl_backends`.
    """
    given = [os.environ.get(name, "").lower().strip() for name in GL_VARIABLES]
    return given[0] or (given[1] if given[1] in OFFSCREEN else next(iter(gl_backends()), None))


def gl_backends() -> list[str]:
    """The OpenGL backends that work on this machine, best first.

    The libraries are called directly, since PyOpenGL can load only one platform per process.
    """
    if sys.platform != "linux":
        return ["glfw"]
    has_display = any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    works = {
        "egl": _egl_has_device(),
        "osmesa": ctypes.util.find_library("OSMesa") is not None,
        "glfw": has_display,
    }
    return [name for name, is_there in works.items() if is_there]


def use_gl() -> str:
    """Sets the backend of `choose_gl` in the environment, where MuJoCo reads it.

    Raises:
        RuntimeError: there is no backend; or the one that the environment asks for does not work
            here, or its variables contradict each other.
    """
    backend = choose_gl()
    if backend is None:
        raise RuntimeError(
            f"MuJoCo finds no OpenGL backend (no EGL device, no OSMesa); {GL_PACKAGES}"
        )
    working = gl_backends()
    given = {name: os.environ[name] for name in GL_VARIABLES if os.environ.get(name)}
    set_to = " and ".join(f"{name}={value}" for name, value in given.items())
    remedy = f"install one: {GL_PACKAGES}"
    if working:
        values = " ".join(f"{name}={working[0]}" for name in GL_VARIABLES)
        remedy = f"works here: {', '.join(working)}; unset {' and '.join(given)}, or set {values}"
    platform = given.get(GL_VARIABLES[1], backend).lower().strip()
    if backend in OFFSCREEN and platform != backend:
        clash = "contradict each other" if len(given) > 1 else f"does not fit {backend!r}"
        raise RuntimeError(f"{set_to} {clash}; {remedy}")
    if backend not in working:
        why = " (there is no display)" if backend == "glfw" else ""
        raise RuntimeError(f"{set_to}: the OpenGL backend {backend!r} does not work{why}; {remedy}")
    os.environ[GL_VARIABLES[0]] = backend
    if backend in OFFSCREEN:
        os.environ[GL_VARIABLES[1]] = backend
    return backend


def _egl_has_device() -> bool:
    """Whether libEGL can open a display on one of its devices."""
    path = ctypes.util.find_library("EGL")
    if path is None:
        return False
    try:
        egl = ctypes.CDLL(path)
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_of = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query or not display_of:
        return False
    devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int(0)
    query_devices = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
    )(query)
    if not query_devices(16, ctypes.cast(devices, ctypes.c_void_p), ctypes.byref(count)):
        return False
    open_display = ctypes.CFUNCTYPE(
        ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p
    )(display_of)
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    for device in devices[: count.value]:
        display = open_display(0x313F, device, None)  # EGL_PLATFORM_DEVICE_EXT
        if display and egl.eglInitialize(display, None, None):
            return True
    return False
