"""Meta-World v3 (Farama-Foundation/Metaworld), headless: 50 tasks of one robot arm."""

from __future__ import annotations

import atexit
import os
import warnings
import weakref
from typing import Any, Literal

import numpy as np

from mmdlm.simulators.simulator import Simulator, nearest, use_gl

# Camera position of huggingface/lerobot: src/lerobot/envs/metaworld.py, closer to the table.
CAMERA, CAMERA_POSITION = "corner2", (0.75, 0.075, 0.7)
# (shadow map size, samples per pixel), read when the GL context is created. "near" equals the
# default visually at 64 pixels; "fast" has no shadows and no antialiasing and is ten times faster.
# The quality is part of the observation: train and evaluate with the same one.
QUALITY = {"default": None, "near": (1024, 4), "fast": (0, 0)}

INSTRUCTIONS = {
    "assembly": "put the ring on the peg",
    "basketball": "throw the ball into the basket",
    "bin-picking": "move the block to the other bin",
    "box-close": "put the lid on the box",
    "button-press": "press the button from the front",
    "button-press-topdown": "press the button from the top",
    "button-press-topdown-wall": "press the button from the top behind the wall",
    "button-press-wall": "press the button from the front behind the wall",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "close the faucet",
    "faucet-open": "open the faucet",
    "hammer": "hammer the nail",
    "hand-insert": "put the hand into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the side handle down",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the side handle up",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "put the peg into the side hole",
    "peg-unplug-side": "unplug the peg",
    "pick-out-of-hole": "pick the puck out of the hole",
    "pick-place": "pick up the puck and hold it at the goal",
    "pick-place-wall": "carry the puck over the wall to the goal",
    "plate-slide": "slide the plate into the goal",
    "plate-slide-back": "slide the plate out of the goal",
    "plate-slide-back-side": "slide the plate out of the side goal",
    "plate-slide-side": "slide the plate into the side goal",
    "push": "push the puck to the goal",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal behind the wall",
    "shelf-place": "place the block on the shelf",
    "soccer": "kick the ball into the net",
    "stick-pull": "pull the box with the stick",
    "stick-push": "push the box with the stick",
    "sweep": "sweep the block off the table",
    "sweep-into": "sweep the block into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
}


class MetaWorld(Simulator):
    """One Meta-World task with one camera; the seed determines the goal.

    State is the hand's position in metres and the gripper opening in [0, 1]; object positions are
    visible in the image only. Actions in [-1, 1]: hand displacement (1 is 1 cm per step) and
    gripper effort. Success is `info["success"]` of the task, at any step.

    Args:
        task: a task of v3, with or without the suffix "-v3".
        size: rows and columns of the image in pixels.
        horizon: steps of an episode, at most 500 (the limit of the benchmark).
        render_quality: "default" as in the benchmark, "near" is visually equal in a quarter of
            the time, "fast" has no shadows and no antialiasing.
    """

    TASKS = tuple(INSTRUCTIONS)

    action_size, state_size, fps = 4, 4, 80

    def __init__(
        self,
        task: str,
        size: int = 64,
        horizon: int = 500,
        render_quality: Literal["default", "near", "fast"] = "fast",
    ) -> None:
        self.task = task.removesuffix("-v3")
        if self.task not in INSTRUCTIONS:
            raise ValueError(f"Meta-World has no task {task!r}{nearest(self.task, INSTRUCTIONS)}")
        if render_quality not in QUALITY:
            raise ValueError(
                f"render_quality is {render_quality!r}, expected one of {list(QUALITY)}"
            )
        if not 1 <= horizon <= 500:
            raise ValueError(f"horizon is {horizon}, expected 1 to 500 (Meta-World ends at 500)")
        self.horizon, self.instruction = horizon, INSTRUCTIONS[self.task]
        self.low, self.high = -np.ones(4, np.float32), np.ones(4, np.float32)
        self._quality = render_quality
        self._open(f"{self.task}-v3", size)

    def _open(self, name: str, size: int) -> None:
        use_gl()  # before the import of mujoco, which reads it once
        try:
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP
        except ImportError as error:
            raise ImportError('MetaWorld needs the extra: pip install "mmdlm[sim]"') from error
        env = ALL_V3_ENVIRONMENTS[name](
            render_mode="rgb_array", camera_name=CAMERA, width=size, height=size
        )
        # As the benchmark's task wrapper: the expert sees the goal, which the seed determines.
        env._partially_observable, env._freeze_rand_vec = False, False
        env._set_task_called = env.seeded_rand_vec = True
        vars(env).pop("sawyer_observation_space", None)  # cached with the goal hidden
        env.model.cam_pos[env.model.camera(CAMERA).id] = CAMERA_POSITION
        if QUALITY[self._quality]:
            quality = env.model.vis.quality
            quality.shadowsize, quality.offsamples = QUALITY[self._quality]
        self._env, self._policy, self._full, self._drawn = env, ENV_POLICY_MAP[name], None, False
        self._close = weakref.finalize(self, env.close)
        self._close.atexit = False

    def _reset(self, seed: int) -> None:
        self._env.seed(seed)
        self._full, _ = self._env.reset()
        self._expert = self._policy()  # some experts count steps, so each episode has a new one

    def _step(self, action: np.ndarray) -> tuple[float, bool]:
        self._full, reward, _, _, info = self._env.step(action)
        return reward, bool(info["success"])

    def expert(self) -> np.ndarray:
        """The action of the benchmark's scripted policy, float32 [4] clipped to [-1, 1]."""
        if self._full is None:
            raise RuntimeError("expert: no episode is running; call reset(seed) first")
        with warnings.catch_warnings():
            # "Constant(s) may be too high": actions far from the goal exceed 1.
            warnings.simplefilter("ignore", UserWarning)
            action = np.asarray(self._expert.get_action(self._full), np.float32)
        return np.clip(action, self.low, self.high)

    def close(self) -> None:
        """Frees the MuJoCo model and its GL context."""
        self._close()

    def settings(self) -> dict[str, Any]:
        """GL backend and camera."""
        camera = {"name": CAMERA, "position": list(CAMERA_POSITION)}
        return {"gl": os.environ.get("MUJOCO_GL"), "camera": camera}

    def _observe(self) -> dict[str, Any]:
        if self._drawn:  # else two simulators would render into the same context
            self._env.mujoco_renderer._get_viewer("rgb_array").make_context_current()
        frame = self._env.render()
        if not self._drawn:
            self._drawn = True
            # MuJoCo registers the termination of EGL with the first frame. Functions registered
            # later run earlier; a context that is closed after EGL, or never, raises at exit.
            atexit.register(self._close)
            if self._quality == "fast" and self._drop_effects():
                frame = self._env.render()
        # The camera image is rotated by 180 degrees.
        return {
            "image": np.ascontiguousarray(frame[::-1, ::-1]),
            "state": self._full[:4].astype(np.float32),
            "prompt": self.instruction,
        }

    def _drop_effects(self) -> bool:
        """Disables shadows and reflections; the scene exists only after the first frame."""
        import mujoco

        scene = self._env.mujoco_renderer._get_viewer("rgb_array").scn
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            scene.flags[flag] = 0
        return True
