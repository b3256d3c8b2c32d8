"""A motorway with traffic (Farama-Foundation/HighwayEnv), seen by three drawn cameras."""

from __future__ import annotations

import copy
import os
import warnings
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from mmdlm.simulators.simulator import Simulator

VIEWS = {"left": -4.0, "image": 0.0, "right": 4.0}
"""Cameras from left to right: metres from the ego vehicle to the middle of the view."""
BEHIND, AHEAD, SIDE = 28.0, 100.0, 4.0  # extent of a view in metres
GRASS, ROAD, LINE, EGO = (44, 84, 44), (72, 72, 72), (170, 170, 170), (250, 220, 60)
EQUAL, SLOWER, FASTER = (235, 235, 235), (235, 40, 40), (50, 90, 245)
SPEEDS = 10.0  # difference in m/s at which a vehicle has the full colour
SUBSTEPS = 3  # simulated time per step is 0.5 s, so highway-env runs at 6 Hz
PAST = 7  # kept states of the ego vehicle: 3 s and now
DESIRED = 30.0  # m/s, speed limit and target of the rule-based driver


class Motion(NamedTuple):
    """State of the ego vehicle: metres on the road, m/s, m/s2."""

    x: float
    y: float
    speed: float
    acceleration: float


@dataclass(frozen=True)
class Future:
    """What the rule-based driver does from the current state on.

    Args:
        waypoints: float64 [seconds 2], positions at 1 s, 2 s, ... relative to the ego vehicle, in
            metres: forward, then to the right.
        speeds: float64 [seconds], m/s at the same times.
        lane: -1 for a change to the left lane, 1 to the right, 0 for none.
        crashed: a collision happens on the way.
    """

    waypoints: np.ndarray
    speeds: np.ndarray
    lane: int
    crashed: bool


@dataclass(frozen=True)
class Neighbour:
    """Another vehicle: metres ahead (negative: behind), lanes to the right, m/s."""

    ahead: float
    lane: int
    speed: float


class Highway(Simulator):
    """The highway task of highway-env: pass slower traffic on a straight road, do not collide.

    Each camera shows a strip of the road from above, 28 m behind to 100 m ahead of the ego vehicle
    (up), 8 m wide. Colours tell the speed relative to the ego vehicle (yellow): red is slower, blue
    is faster. Observations have the keys of `cameras`, "state" and "prompt". State is the speed
    in m/s, the distance to the middle of the lane in m (positive: to the right) and the heading in
    rad.

    Actions are the acceleration in m/s2, in [-6, 6], and the lane: -1 for a change to the left, 1
    to the right, 0 (any value closer to it) for the current lane. highway-env's controller steers.
    Both hold for 0.5 s. Success is reaching the horizon without a collision; a collision ends the
    episode.

    Args:
        size: rows and columns of each image in pixels.
        horizon: steps of 0.5 s of an episode.
        lanes: lanes of the road.
        vehicles: other vehicles, all ahead at the start.
        cameras: views of an observation: "left", "image" (centre), "right".
    """

    action_size, state_size, fps = 2, 3, 2
    instruction = "drive fast and do not collide"

    def __init__(
        self,
        size: int = 64,
        horizon: int = 60,
        lanes: int = 3,
        vehicles: int = 15,
        cameras: Items[str] = ("image",),
    ) -> None:
        if size < 16 or min(horizon, lanes, vehicles) < 1:
            raise ValueError(
                f"Highway: size is {size}, horizon {horizon}, lanes {lanes} and vehicles "
                f"{vehicles}, expected at least 16, 1, 1 and 1"
            )
        if unknown := set(cameras) - set(VIEWS):
            raise ValueError(
                f"Highway: cameras are {list(cameras)}, {unknown} not in {list(VIEWS)}"
            )
        self.size, self.horizon, self.cameras = size, horizon, tuple(cameras)
        self.autopilot = False
        """The rule-based driver drives the ego vehicle at every simulation step."""
        self.low = np.array([-6, -1], np.float32)
        self.high = np.array([6, 1], np.float32)
        self._config = {
            "simulation_frequency": self.fps * SUBSTEPS,
            "policy_frequency": self.fps,
            "lanes_count": lanes,
            "vehicles_count": vehicles,
            "duration": horizon / self.fps,
            "offscreen_rendering": True,
        }
        environment, self._ego_class = _classes()
        self._env = environment(self._config)
        self._past: deque[Motion] = deque(maxlen=PAST)
        self._speeds: list[float] = []

    def close(self) -> None:
        """Frees the environment."""
        self._env.close()

    @property
    def crashed(self) -> bool:
        """The ego vehicle collided in this episode."""
        return bool(self._ego.crashed)

    @property
    def mean_speed(self) -> float:
        """Mean speed of this episode in m/s, up to the collision if there was one."""
        return float(np.mean(self._speeds))

    @property
    def speed(self) -> float:
        """Current speed in m/s."""
        return float(self._ego.speed)

    def history(self) -> list[Motion]:
        """States of the ego vehicle 3 s, 2.5 s, ..., 0 s ago, positions relative to the last.

        Before the start it is assumed to have driven at its first speed.
        """
        now, first = self._past[-1], self._past[0]
        missing = PAST - len(self._past)
        early = [
            first._replace(x=first.x - (missing - i) * first.speed / self.fps, acceleration=0.0)
            for i in range(missing)
        ]
        return [m._replace(x=m.x - now.x, y=m.y - now.y) for m in (*early, *self._past)]

    def neighbours(self) -> list[Neighbour]:
        """The vehicles within sight, nearest first."""
        ego, found = self._ego, []
        for other in self._env.road.vehicles:
            ahead = float(other.position[0] - ego.position[0])
            if other is not ego and -BEHIND <= ahead <= AHEAD:
                lane = int(other.lane_index[2] - ego.lane_index[2])
                found.append(Neighbour(ahead, lane, float(other.speed)))
        return sorted(found, key=lambda other: abs(other.ahead))

    def lanes_beside(self) -> tuple[bool, bool]:
        """Whether there is a lane to the left, and to the right."""
        lane = self._ego.lane_index[2]
        return lane > 0, lane < self._config["lanes_count"] - 1

    def expert(self) -> np.ndarray:
        """Action of highway-env's rule-based driver (IDM and MOBIL), float32 [2].

        MOBIL, which highway-env runs once per second, runs at every call.
        """
        if self._steps is None:
            raise RuntimeError("expert: no episode is running; call reset(seed) first")
        ego = self._ego
        kept = {k: getattr(ego, k) for k in ("command", "timer", "target_lane_index", "action")}
        ego.command, ego.timer = None, ego.LANE_CHANGE_DELAY + 1
        ego.act()
        lane, acceleration = self._lane_change(), ego.action["acceleration"]
        for name, value in kept.items():
            setattr(ego, name, value)
        return np.array([acceleration, lane], np.float32).clip(self.low, self.high)

    def future(self, seconds: int = 5) -> Future:
        """What would happen if the rule-based driver took over; the episode does not change.

        Args:
            seconds: length of the prediction, at least 1.
        """
        env = copy.deepcopy(self._env)
        ego, road = env.vehicle, env.road
        start = ego.position.copy()
        lane = int(self.expert()[1])
        ego.command, ego.timer = None, ego.LANE_CHANGE_DELAY + 1
        places, speeds = [], []
        for _ in range(seconds):
            for _ in range(self.fps * SUBSTEPS):
                road.act()
                road.step(1 / (self.fps * SUBSTEPS))
            places.append(ego.position - start)
            speeds.append(float(ego.speed))
        return Future(np.stack(places), np.array(speeds), lane, bool(ego.crashed))

    @property
    def _ego(self) -> Any:
        return self._env.vehicle

    def _lane_change(self) -> int:
        """Target lane relative to the current one."""
        return int(self._ego.target_lane_index[2] - self._ego.lane_index[2])

    def _reset(self, seed: int) -> None:
        self._env.reset(seed=seed)
        old, vehicles = self._env.vehicle, self._env.road.vehicles
        ego = self._ego_class.create_from(old)
        ego.target_speed = DESIRED
        vehicles[vehicles.index(old)] = self._env.vehicle = ego
        self._past.clear()
        self._past.append(Motion(*map(float, ego.position), float(ego.speed), 0.0))
        self._speeds = []

    def _step(self, action: np.ndarray) -> tuple[float, bool]:
        ego, before = self._ego, self._ego.speed
        ego.command = None if self.autopilot else float(action[0])
        if not self.autopilot:
            _from, to, lane = ego.lane_index
            lane = int(np.clip(lane + round(float(action[1])), 0, self._config["lanes_count"] - 1))
            ego.target_lane_index = (_from, to, lane)
        for _ in range(SUBSTEPS):
            self._env.road.act()
            self._env.road.step(1 / (self.fps * SUBSTEPS))
            self._speeds.append(float(ego.speed))
            if ego.crashed:
                break
        gained = (float(ego.speed) - float(before)) * self.fps
        self._past.append(Motion(*map(float, ego.position), float(ego.speed), gained))
        self.failed = self.crashed
        reward = 0.0 if self.crashed else float(ego.speed) / DESIRED
        return reward, not self.crashed and self._steps + 1 >= self.horizon

    def _observe(self) -> dict[str, Any]:
        ego = self._ego
        offset = float(ego.lane_offset[1])
        return {
            **{name: self._view(VIEWS[name]) for name in self.cameras},
            "state": np.array([ego.speed, offset, ego.heading], np.float32),
            "prompt": self.instruction,
        }

    def _view(self, middle: float) -> np.ndarray:
        """One camera, uint8 [size size 3].

        Args:
            middle: metres from the ego vehicle to the middle of the view, to the right.
        """
        ego, width = self._ego, float(self._env.road.network.get_lane(("0", "1", 0)).width)
        image = np.empty((self.size, self.size, 3), np.float32)
        image[:] = GRASS
        left = ego.position[1] + middle - SIDE  # road coordinate of the left border of the view
        everything = (-BEHIND, AHEAD)
        edges = [width * (i - 0.5) for i in range(self._config["lanes_count"] + 1)]
        self._paint(image, everything, (edges[0] - left, edges[-1] - left), ROAD)
        for edge in edges:
            self._paint(image, everything, (edge - 0.1 - left, edge + 0.1 - left), LINE)
        for other in self._env.road.vehicles:
            x, y = other.position - (ego.position[0], left)
            if not (-BEHIND - other.LENGTH < x < AHEAD + other.LENGTH):
                continue
            colour = EGO if other is ego else _colour(float(other.speed - ego.speed))
            half, side = other.LENGTH / 2, other.WIDTH / 2
            self._paint(image, (x - half, x + half), (y - side, y + side), colour)
        return (image + 0.5).astype(np.uint8)

    def _paint(
        self,
        image: np.ndarray,
        along: tuple[float, float],
        across: tuple[float, float],
        colour: tuple[float, ...],
    ) -> None:
        """Paints a rectangle, antialiased.

        Args:
            image: float32 [Y X 3], changed in place.
            along: its end and front in metres ahead of the ego vehicle.
            across: its sides in metres from the left border.
            colour: RGB.
        """
        scale = self.size / (AHEAD + BEHIND)
        rows = _coverage((AHEAD - along[1]) * scale, (AHEAD - along[0]) * scale, self.size)
        scale = self.size / (2 * SIDE)
        columns = _coverage(across[0] * scale, across[1] * scale, self.size)
        share = (rows[:, None] * columns)[..., None]
        image += share * (np.array(colour, np.float32) - image)


def _coverage(start: float, stop: float, count: int) -> np.ndarray:
    """Share of each of `count` pixels that an interval covers, float32."""
    pixels = np.arange(count, dtype=np.float32)
    return np.clip(np.minimum(stop, pixels + 1) - np.maximum(start, pixels), 0, 1)


def _colour(faster: float) -> tuple[float, ...]:
    """Colour of a vehicle that is so many m/s faster than the ego vehicle."""
    end = FASTER if faster > 0 else SLOWER
    share = min(abs(faster) / SPEEDS, 1.0)
    return tuple(a + share * (b - a) for a, b in zip(EQUAL, end, strict=True))


@cache
def _classes() -> tuple[type, type]:
    """highway-env's environment, and the ego vehicle."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame opens a window otherwise
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # pygame: "pkg_resources is deprecated"
            from highway_env.envs.highway_env import HighwayEnvFast
            from highway_env.vehicle.behavior import IDMVehicle
            from highway_env.vehicle.kinematics import Vehicle
    except ImportError as error:
        raise ImportError('Highway needs the extra: pip install "mmdlm[sim]"') from error

    class Ego(IDMVehicle):
        """Follows its target lane with a given acceleration; without one it drives itself."""

        command: float | None = None

        def act(self, action: Any = None) -> None:
            """Sets steering and acceleration."""
            if self.command is None or self.crashed:
                super().act(action)
                return
            limit = self.MAX_STEERING_ANGLE
            steering = float(np.clip(self.steering_control(self.target_lane_index), -limit, limit))
            Vehicle.act(self, {"steering": steering, "acceleration": self.command})

    return HighwayEnvFast, Ego
