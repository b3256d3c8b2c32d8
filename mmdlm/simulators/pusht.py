"""PushT (huggingface/gym-pusht): push a T-shaped block onto its outline."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from mmdlm.simulators.simulator import Simulator


class PushT(Simulator):
    """The PushT task of gym-pusht 0.1; there is no scripted expert.

    State is the pusher's position and actions are its target position, both in [0, 512], x then y
    (downwards). Success is a coverage above 95 %; the reward is the coverage over 95 %, at most 1.

    Args:
        size: rows and columns of the image in pixels.
        horizon: steps of an episode (the published limit is 300).
    """

    action_size, state_size, fps = 2, 2, 10
    instruction = "push the block onto the outline"

    def __init__(self, size: int = 96, horizon: int = 300) -> None:
        if size < 16 or horizon < 1:
            raise ValueError(
                f"PushT: size is {size} and horizon {horizon}, expected at least 16 and 1"
            )
        self.horizon = horizon
        self.low, self.high = np.zeros(2, np.float32), np.full(2, 512, np.float32)
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame opens a window otherwise
        try:
            import pymunk
            from gym_pusht.envs import PushTEnv
        except ImportError as error:
            raise ImportError('PushT needs the extra: pip install "mmdlm[sim]"') from error
        if int(pymunk.version.split(".")[0]) >= 7:
            raise ImportError(
                f"PushT needs pymunk below 7, found {pymunk.version}; pip install 'pymunk<7'"
            )
        self._env = PushTEnv(
            obs_type="pixels_agent_pos",
            render_mode="rgb_array",
            observation_width=size,
            observation_height=size,
        )

    def close(self) -> None:
        """Frees the environment."""
        self._env.close()

    def _reset(self, seed: int) -> None:
        self._found = self._env.reset(seed=seed)[0]

    def _step(self, action: np.ndarray) -> tuple[float, bool]:
        self._found, reward, _, _, info = self._env.step(action)
        return reward, bool(info["is_success"])

    def _observe(self) -> dict[str, Any]:
        return {
            "image": np.ascontiguousarray(self._found["pixels"]),
            "state": self._found["agent_pos"].astype(np.float32),
            "prompt": self.instruction,
        }
