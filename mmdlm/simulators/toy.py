"""Toy task: move a dot to the disc of a named colour; no physics, no dependencies."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmdlm.simulators.simulator import Simulator

COLOURS = {"red": (225, 40, 40), "green": (40, 175, 60), "blue": (45, 105, 245)}
REACH = 0.1  # distance moved by an action of 1; the board is [-1, 1] wide
NEAR = 0.15  # distance at which the target counts as reached


class Toy(Simulator):
    """Two discs of different colours and a white dot; the instruction names the target disc.

    State is the dot's position in [-1, 1], x then y (downwards); actions in [-1, 1] move it.

    Args:
        size: rows and columns of the image in pixels.
        horizon: steps of an episode; the expert needs at most 17.
    """

    action_size, state_size, fps = 2, 2, 10

    def __init__(self, size: int = 32, horizon: int = 40) -> None:
        if size < 16 or horizon < 1:
            raise ValueError(
                f"Toy: size is {size} and horizon {horizon}, expected at least 16 and 1"
            )
        self.size, self.horizon = size, horizon
        self.low, self.high = -np.ones(2, np.float32), np.ones(2, np.float32)

    def expert(self) -> np.ndarray:
        """Action straight towards the target, float32 [2]."""
        if self._steps is None:
            raise RuntimeError("expert: no episode is running; call reset(seed) first")
        return np.clip((self._discs[self._named] - self._dot) / REACH, -1, 1).astype(np.float32)

    def _reset(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        first, second = rng.permutation(list(COLOURS))[:2].tolist()
        places = rng.uniform(-0.8, 0.8, (2, 2))
        places[:, 0] = [-abs(places[0, 0]) - 0.15, abs(places[1, 0]) + 0.15]  # no overlap
        self._discs = {first: np.clip(places[0], -0.8, 0.8), second: np.clip(places[1], -0.8, 0.8)}
        self._named = [first, second][rng.integers(2)]
        self._dot = rng.uniform([-0.1, -0.8], [0.1, 0.8])
        self.instruction = f"go to the {self._named} disc"

    def _step(self, action: np.ndarray) -> tuple[float, bool]:
        self._dot = np.clip(self._dot + REACH * action, -1, 1)
        distance = float(np.linalg.norm(self._dot - self._discs[self._named]))
        return -distance, distance < NEAR

    def _observe(self) -> dict[str, Any]:
        middle = (np.arange(self.size) + 0.5) / self.size * 2 - 1
        x, y = np.meshgrid(middle, middle)
        image = np.full((self.size, self.size, 3), 40, np.uint8)
        drawn = [(place, 0.2, COLOURS[name]) for name, place in self._discs.items()]
        for place, radius, colour in [*drawn, (self._dot, 0.1, (255, 255, 255))]:
            image[(x - place[0]) ** 2 + (y - place[1]) ** 2 < radius**2] = colour
        state = self._dot.astype(np.float32)
        return {"image": image, "state": state, "prompt": self.instruction}
