"""The base every simulator keeps, and `open_simulator`, which finds one by name."""

from __future__ import annotations

import ctypes
import ctypes.util
import difflib
import importlib
import os
import sys
from typing import Any, Self

import numpy as np

# A name is a file of this folder and the class in it; the part after a slash is the task.
KNOWN = {"toy": "Toy", "pusht": "PushT", "metaworld": "MetaWorld"}
GL_PACKAGES = "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri   (or: libosmesa6)"


class Simulator:
    """A robot in a world: observation in, reward and success out.

    Subclasses set the attributes below and define `_reset`, `_step`, `_observe` and, if there is
    one, `expert`. Observations are
    `{"image": uint8 [Y X 3] RGB, "state": float32 [S], "prompt": str}`.

    Attributes:
        instruction: what the robot is asked to do, lower-case words.
        action_size: A.
        state_size: S.
        horizon: steps after which an episode ends without success.
        low: float32 [A], smallest action in robot units.
        high: float32 [A], largest action in robot units.
        fps: control steps per second of simulated time.
        clipped: actions of this episode that were outside the limits and were clipped.
    """

    instruction: str = ""
    action_size: int
    state_size: int
    horizon: int
    low: np.ndarray
    high: np.ndarray
    fps: int = 10
    clipped: int = 0
    _steps: int | None = None  # None until the first reset
    _succeeded: bool = False

    def reset(self, seed: int) -> dict[str, Any]:
        """The first observation of the episode that `seed` stands for.

        Args:
            seed: not negative; the same seed gives the same start and the same goal.
        """
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"reset: seed is {seed!r}, expected an integer of 0 or more")
        self.clipped, self._steps, self._succeeded = 0, 0, False
        self._reset(int(seed))
        return self._observe()

    def step(
        self, action: np.ndarray, look: bool = True
    ) -> tuple[dict[str, Any], float, bool, bool]:
        """Observation, reward, success and done after one action.

        Args:
            action: float [A] in robot units; values outside the limits are clipped and counted.
            look: whether the observation is wanted; drawing it takes most of a step's time, and a
                policy that plays several actions of a chunk looks only before the next one.
        Returns:
            observation, empty unless wanted; reward of this step; whether the task has been solved
            at this or any earlier step; whether the episode is over (solved, or out of steps).
            Stepping on after success is allowed up to the horizon.
        Raises:
            ValueError: the action is not finite or not of shape [A].
            RuntimeError: the episode has not been started or has run out of steps.
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
        obs = self._observe() if look else {}
        return obs, float(reward), self._succeeded, self._succeeded or self._steps >= self.horizon

    def expert(self) -> np.ndarray:
        """The scripted expert's action for the present state, float32 [A] within the limits.

        It may look at the true positions of objects, which observations never hold; it exists to
        record demonstrations.
        """
        raise TypeError(
            f"{type(self).__name__} has no scripted expert; record demonstrations elsewhere"
        )

    def close(self) -> None:
        """Frees the world; the simulator cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _checked(self, action: np.ndarray) -> np.ndarray:
        action = np.asarray(action, dtype=np.float32)
        if action.shape != (self.action_size,):
            raise ValueError(
                f"step: action has shape {list(action.shape)}, expected [{self.action_size}]; "
                "play a chunk one row at a time"
            )
        if not np.isfinite(action).all():
            raise ValueError(
                f"step: action {action.tolist()} holds NaN or infinity; nothing was moved"
            )
        within = np.clip(action, self.low, self.high)
        self.clipped += int((within != action).any())
        return within

    def _reset(self, seed: int) -> None:
        raise TypeError(f"{type(self).__name__} cannot start an episode; define _reset(seed)")

    def _step(self, action: np.ndarray) -> tuple[float, bool]:
        raise TypeError(f"{type(self).__name__} cannot move; define _step(action)")

    def _observe(self) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} cannot see; define _observe()")


def open_simulator(name: str, **options: Any) -> Simulator:
    """The simulator of that name, ready for `reset`.

    Args:
        name: "toy", "pusht" or "metaworld/<task>", for example "metaworld/drawer-close"; a
            trailing "-v3" is optional.
        **options: arguments of the simulator's class (`size`, `horizon`, ...).
    Raises:
        ValueError: no simulator or task has that name; the nearest names are given.
    """
    family, _, task = name.partition("/")
    if family not in KNOWN:
        raise ValueError(
            f"simulator {name!r} is unknown{nearest(family, KNOWN)}; known: {', '.join(KNOWN)}"
        )
    made = getattr(importlib.import_module(f"mmdlm.simulators.{family}"), KNOWN[family])
    if family == "metaworld":
        if not task:
            raise ValueError(
                "simulator 'metaworld' needs a task, for example 'metaworld/drawer-close'"
            )
        return made(task, **options)
    if task:
        raise ValueError(f"simulator {family!r} has no tasks, but {name!r} names {task!r}; drop it")
    return made(**options)


def nearest(name: str, known: Any) -> str:
    """The words " (did you mean ...?)" for a misspelt name, or nothing when none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def choose_gl() -> str | None:
    """The OpenGL backend MuJoCo can render with on this machine, or None when there is none.

    "egl" or "osmesa" on Linux, "glfw" elsewhere; a value the user gave in `MUJOCO_GL` wins. The
    libraries are asked directly: PyOpenGL can load one platform per process, so it cannot try two.
    """
    if os.environ.get("MUJOCO_GL"):
        return os.environ["MUJOCO_GL"]
    if sys.platform != "linux":
        return "glfw"
    if _egl_has_device():
        return "egl"
    return "osmesa" if ctypes.util.find_library("OSMesa") else None


def use_gl() -> str:
    """The backend from `choose_gl`, written into the environment for MuJoCo to read.

    Raises:
        RuntimeError: nothing on this machine renders.
    """
    backend = choose_gl()
    if backend is None:
        raise RuntimeError(
            f"MuJoCo has no OpenGL to render with (no EGL device, no OSMesa); {GL_PACKAGES}"
        )
    os.environ.setdefault("MUJOCO_GL", backend)
    if backend in ("egl", "osmesa"):
        os.environ.setdefault("PYOPENGL_PLATFORM", backend)
    return backend


def _egl_has_device() -> bool:
    """Whether libEGL opens a display on one of its devices (libEGL alone proves nothing)."""
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
    asked = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
    )(query)
    if not asked(16, ctypes.cast(devices, ctypes.c_void_p), ctypes.byref(count)):
        return False
    opened = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(
        display_of
    )
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    for device in devices[: count.value]:
        display = opened(0x313F, device, None)  # EGL_PLATFORM_DEVICE_EXT
        if display and egl.eglInitialize(display, None, None):
            return True
    return False
