"""Closed-loop driving: a model's plans against the rule-based driver, over the same seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from mmdlm.atomic import write_text
from mmdlm.decoding.preset import Choice
from mmdlm.model import MultimodalDLM
from mmdlm.simulators import video as films
from mmdlm.simulators.highway import Highway
from mmdlm.simulators.rollout import versions, wilson
from mmdlm.tasks.drive import CAMERAS, Follow, plan, prompt

POLICY, RULES, CONSTANT = "policy", "rule-based", "constant speed"


class Driver(Protocol):
    """Chooses the next action of several cars at once.

    Attributes:
        name: for tables.
        looks: it needs observations.
        plan_ms: wall time per plan so far in milliseconds; 0 without plans.
    """

    name: str
    looks: bool
    plan_ms: float

    def start(self, cars: Items[Highway]) -> None:
        """Called once, after the resets."""

    def act(
        self, cars: Items[Highway], seen: Items[dict[str, Any]]
    ) -> list[tuple[np.ndarray, str]]:
        """Action, see `Highway`, and a line about it for each car.

        Args:
            cars: those whose episode goes on.
            seen: their observations.
        """


class Rules:
    """highway-env's rule-based driver, IDM and MOBIL, at every simulation step."""

    name, looks, plan_ms = RULES, False, 0.0

    def start(self, cars: Items[Highway]) -> None:
        """Has the cars drive themselves."""
        for car in cars:
            car.autopilot = True

    def act(
        self, cars: Items[Highway], seen: Items[dict[str, Any]]
    ) -> list[tuple[np.ndarray, str]]:
        """Nothing is left to choose."""
        return [(np.zeros(2, np.float32), "")] * len(cars)


class Constant(Rules):
    """Keeps lane and speed."""

    name = CONSTANT

    def start(self, cars: Items[Highway]) -> None:
        """Nothing to prepare."""


class Planner:
    """Drives by a model's plans, which are decoded in one batch for all cars.

    Args:
        model: see `mmdlm.tasks.drive.plan`.
        strategies: see `mmdlm.tasks.drive.plan`.
        seed: see `mmdlm.infill`.
        follow: see `mmdlm.tasks.drive.Plan.action`.
    """

    name, looks = POLICY, True

    def __init__(
        self,
        model: MultimodalDLM,
        strategies: Choice = None,
        seed: int | None = 0,
        follow: Follow = "behavior",
    ) -> None:
        self.model, self.seed, self.follow = model, seed, follow
        self.strategies = strategies
        self.seconds = 0.0
        """Wall time of all plans so far."""
        self.plans = 0
        """Plans so far."""

    @property
    def plan_ms(self) -> float:
        """See `Driver`; that of a batch is divided by its size."""
        return 1e3 * self.seconds / max(1, self.plans)

    def start(self, cars: Items[Highway]) -> None:
        """Nothing to prepare."""

    def act(
        self, cars: Items[Highway], seen: Items[dict[str, Any]]
    ) -> list[tuple[np.ndarray, str]]:
        """Actions of the plans, and their explanations."""
        begin = time.perf_counter()
        scenes = [
            ([obs[name] for name in CAMERAS], prompt(car.history()))
            for car, obs in zip(cars, seen, strict=True)
        ]
        plans = plan(
            self.model,
            scenes,
            strategies=self.strategies,
            batch_size=len(scenes),
            seed=self.seed,
        )
        self.seconds += time.perf_counter() - begin
        self.plans += len(plans)
        return [
            (one.action(car.speed, self.follow), one.value["explanation"])
            for one, car in zip(plans, cars, strict=True)
        ]


@dataclass
class Drive:
    """One episode of a driver.

    Args:
        seed: of the simulator.
        collided: it ended in a collision.
        speed: mean speed in m/s, until the collision if there was one.
        seconds: simulated time.
        frames: an image per step if requested.
    """

    seed: int
    collided: bool = False
    speed: float = 0.0
    seconds: float = 0.0
    frames: list[np.ndarray] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Result:
    """Episodes of a driver.

    Args:
        name: of the driver.
        drives: in the order of the seeds.
        plan_ms: wall time per plan in milliseconds, of a batch divided by its size; 0 without.
    """

    name: str
    drives: tuple[Drive, ...]
    plan_ms: float = 0.0

    @property
    def collisions(self) -> int:
        """Episodes that ended in a collision."""
        return sum(drive.collided for drive in self.drives)

    @property
    def speed(self) -> float:
        """Mean of the episodes' mean speeds in m/s."""
        return float(np.mean([drive.speed for drive in self.drives]))

    def __str__(self) -> str:
        count = len(self.drives)
        low, high = (100 * each for each in wilson(self.collisions, count))
        said = f"{self.name}: collisions {self.collisions}/{count} = "
        said += f"{100 * self.collisions / count:.0f} % [{low:.0f}, {high:.0f}]"
        said += f", mean speed {self.speed:.1f} m/s"
        return said + (f", {self.plan_ms:.0f} ms per plan" if self.plan_ms else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain types for a JSON file."""
        drives = [{k: v for k, v in vars(one).items() if k != "frames"} for one in self.drives]
        found = {"name": self.name, "collisions": self.collisions, "count": len(self.drives)}
        return found | {"speed": self.speed, "plan_ms": self.plan_ms, "drives": drives}


def run(
    driver: Driver,
    seeds: Items[int],
    size: int = 64,
    horizon: int = 60,
    filmed: int = 0,
    progress: bool = False,
) -> Result:
    """Drives all seeds side by side until a collision or the horizon.

    Args:
        driver: the driver.
        seeds: one episode each; demonstrations use seeds from 1000, so stay below.
        size: side of the images in pixels.
        horizon: steps of 0.5 s of an episode.
        filmed: number of episodes, from the first, whose frames are kept.
        progress: show a progress bar.
    Raises:
        ValueError: there are no seeds.
    """
    if not len(seeds):
        raise ValueError("run: no seeds; give at least one")
    cars = [Highway(size, horizon, cameras=CAMERAS) for _ in seeds]
    seen = [car.reset(int(seed)) for car, seed in zip(cars, seeds, strict=True)]
    drives = [Drive(int(seed)) for seed in seeds]
    driver.start(cars)
    active = list(range(len(cars)))
    bar = tqdm(total=horizon, desc=driver.name, unit="step", disable=not progress, leave=False)
    while active:
        actions = driver.act([cars[i] for i in active], [seen[i] for i in active])
        going = []
        for i, (action, line) in zip(active, actions, strict=True):
            seen[i], _, _, done = cars[i].step(action, observe=driver.looks or i < filmed)
            drives[i].seconds += 1 / cars[i].fps
            if i < filmed:
                drives[i].frames.append(_frame(driver.name, cars[i], seen[i], line))
            going += [] if done else [i]
        active = going
        bar.update()
        bar.set_postfix_str(f"{sum(car.crashed for car in cars)} collisions")
    bar.close()
    for one, car in zip(drives, cars, strict=True):
        one.collided, one.speed = car.crashed, car.mean_speed
        car.close()
    return Result(driver.name, tuple(drives), driver.plan_ms)


def _frame(name: str, car: Highway, obs: dict[str, Any], line: str) -> np.ndarray:
    """The three views side by side, with the speed and a line below."""
    views = np.concatenate([obs[camera] for camera in CAMERAS], 1)
    state = "collision" if car.crashed else line
    good = False if car.crashed else None
    return films.annotate(views, [f"{name}: {car.speed:.1f} m/s", state], good)


def drive(
    model: str,
    episodes: int = 20,
    seed: int = 0,
    decoding: str | None = None,
    follow: Follow = "behavior",
    horizon: int = 60,
    video: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    adapter: str | None = None,
) -> int:
    """Drive on a simulated motorway; collisions and speed against the rule-based driver.

    mmdlm drive --model ./my-driver --episodes 20

    The same seeds are driven by the model, by highway-env's rule-based driver (IDM and MOBIL), and
    with constant lane and speed.

    Args:
        model: folder or hub id of a model trained by configs/train/driving.yaml.
        episodes: episodes of each driver.
        seed: seed of the first episode; the following ones count up.
        decoding: decoding preset; by default the most confident tokens first, in 8 forwards.
        follow: "behavior" accelerates as the longitudinal behavior says, "trajectory" as the
            waypoints do; the lateral behavior decides about the lane.
        horizon: steps of 0.5 s of an episode.
        video: folder for an mp4 of each driver's first episode.
        out: JSON file for the results, with every setting.
        device: "auto", "cpu", "cuda".
        adapter: folder or hub id of a LoRA adapter of the model, merged into its weights.
    Returns:
        0, independent of the collisions.
    """
    from mmdlm.checkpoint import load

    if min(episodes, horizon) < 1:
        raise ValueError(f"episodes is {episodes} and horizon {horizon}, expected at least 1")
    loaded = load(model, device=device, adapter=adapter)
    loaded.processor.require("image")
    size = getattr(loaded.encoders["image"], "size", None) or 64
    results = []
    for driver in (Planner(loaded, decoding, follow=follow), Rules(), Constant()):
        seeds, filmed = range(seed, seed + episodes), int(video is not None)
        results.append(run(driver, seeds, size, horizon, filmed, progress=True))
        print(results[-1], flush=True)
        if video is not None:
            file = video / f"{driver.name.replace(' ', '-')}-seed{seed}.mp4"
            print(f"  {films.write(file, results[-1].drives[0].frames, fps=4)}")
    if out is not None:
        settings = {"model": model, "adapter": adapter, "decoding": decoding, "follow": follow}
        settings |= {
            "horizon": horizon,
            "seed": seed,
            "device": str(loaded.device),
            "versions": versions(),
        }
        found = {"settings": settings, "results": [result.to_dict() for result in results]}
        write_text(out, json.dumps(found, indent=2) + "\n")
    return 0
