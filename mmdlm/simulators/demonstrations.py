"""Recorded driving of highway-env's rule-based driver, as conversations with three images."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmdlm.atomic import write_text
from mmdlm.simulators.highway import Future, Highway, Motion
from mmdlm.tasks.drive import CAMERAS, FASTER, LATERAL, OBJECTS, REASONS, SCHEMA, prompt

FIRST_SEED = 1000  # evaluation uses seeds from 0
EVERY = 3  # every third step is recorded, and all with a lane change
SOME, HARD = 0.5, 2.5  # m/s2, from which the speed is not kept, and from which the car brakes
SIGHT, BESIDE, BEHIND = 40.0, 20.0, 20.0  # m
CONFLICT = 5.0  # s until a collision at the current speeds
LENGTH = 5.0  # m, of a vehicle
SWAP = {"left": "right", "right": "left"}


class Scene(NamedTuple):
    """Images from left to right, history of the ego vehicle, and the plan as in `SCHEMA`."""

    images: tuple[np.ndarray, ...]
    history: list[Motion]
    plan: dict[str, Any]


def make(
    out: Path,
    count: int,
    seed: int = FIRST_SEED,
    size: int = 64,
    horizon: int = 60,
    on_rows: Callable[[int], None] | None = None,
) -> str:
    """Writes scenes with the plans of the rule-based driver, and returns what was written.

    `out` gets train.json and val.json (about a twentieth, of other episodes) in LLaVA's format,
    images/ and schema.json. Each scene is also written mirrored.

    Args:
        out: folder to write; must be empty or not exist.
        count: rows at least, mirrored ones included; the last episode is written as a whole.
        seed: seed of the first episode. Evaluation uses seeds from 0, so stay at 1000 or above.
        size: side of the images in pixels.
        horizon: steps of 0.5 s of an episode.
        on_rows: called after each episode with the number of rows so far.
    Raises:
        ValueError: the folder has files, or the count is not positive.
    """
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another folder")
    (out / "images").mkdir(parents=True)
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    total = 0
    with Highway(size, horizon, cameras=CAMERAS) as simulator:
        while total < count or not parts["val"]:
            part = parts["train" if len(parts["val"]) > total / 20 or not total else "val"]
            for scene in scenes(simulator, seed):
                for each in (scene, mirrored(scene)):
                    part.append(_written(out, total, each))
                    total += 1
            seed += 1
            if on_rows is not None:
                on_rows(total)
    for name, rows in parts.items():
        write_text(out / f"{name}.json", json.dumps(rows) + "\n")
    write_text(out / "schema.json", json.dumps(SCHEMA, indent=2) + "\n")
    return f"{out}: {len(parts['train'])} rows to train on, {len(parts['val'])} held out"


def scenes(simulator: Highway, seed: int) -> Iterator[Scene]:
    """Scenes of one episode.

    For about half of the time the car is disturbed: for one to five seconds it keeps its speed or
    an acceleration drawn at random, and in a fifth of the cases changes the lane first. So the
    history does not tell what the rule-based driver does next: a model trained on its undisturbed
    driving goes on with what it did before. Plans are always those of the undisturbed driver; those
    that end in a collision are left out.

    Args:
        simulator: an open simulator with all cameras.
        seed: seed of the episode and of its disturbances.
    """
    rng = np.random.default_rng([seed, 7919])  # differs from the simulator's stream
    obs, done, left, held, lane = simulator.reset(seed), False, 0, 0.0, 0
    step = int(rng.integers(EVERY))
    while not done:
        action = simulator.expert()
        if step % EVERY == 0 or action[1] != 0:
            future = simulator.future()
            if not future.crashed:
                images = tuple(obs[name] for name in CAMERAS)
                yield Scene(images, simulator.history(), plan(simulator, future))
        if left == 0 and rng.random() < 0.15:
            left = int(rng.integers(2, 11))
            held = float(rng.choice([0.0, rng.normal(0, 2.5)]))
            lane = int(rng.choice([-1, 1])) if rng.random() < 0.2 else 0
        executed = action if left == 0 else np.array([held, lane])
        left, lane, step = max(left - 1, 0), 0, step + 1
        obs, _, _, done = simulator.step(np.clip(executed, simulator.low, simulator.high))


def plan(simulator: Highway, future: Future) -> dict[str, Any]:
    """The answer for the current scene, as in `SCHEMA`.

    Args:
        simulator: an episode is running.
        future: what the rule-based driver would do.
    """
    objects = critical_objects(simulator)
    longitudinal = behavior(float(future.speeds[0]) - simulator.speed)
    lateral = next(name for name, change in LATERAL.items() if change == future.lane)
    reason = REASONS[longitudinal, not objects["front_vehicle"]]
    if future.lane:
        reason += FASTER.format(lateral)
    return {
        "critical_objects": {
            name: "yes" if is_there else "no" for name, is_there in objects.items()
        },
        "explanation": reason,
        "future_meta_behavior": {"longitudinal": longitudinal, "lateral": lateral},
        "trajectory": [[round(v, 1) + 0.0 for v in point] for point in future.waypoints.tolist()],
    }


def behavior(gained: float) -> str:
    """Longitudinal behavior of a car that gains so many m/s within a second."""
    if abs(gained) <= SOME:
        return "cruise"
    return "accelerate" if gained > 0 else "brake" if gained < -HARD else "decelerate"


def critical_objects(simulator: Highway) -> dict[str, bool]:
    """Whether each of `mmdlm.tasks.drive.OBJECTS` is there.

    A vehicle is in front up to 40 m ahead, at the rear up to 20 m behind, beside up to 20 m ahead
    or behind in the next lane. The front vehicle conflicts if it would be reached within 5 s.
    """
    found = dict.fromkeys(OBJECTS, False)
    for other in simulator.neighbours():
        if other.lane == 0 and other.ahead > 0:
            gap = other.ahead - LENGTH
            found["front_vehicle"] |= other.ahead <= SIGHT
            found["conflicting_vehicle"] |= gap < CONFLICT * (simulator.speed - other.speed)
        elif other.lane == 0:
            found["rear_vehicle"] |= other.ahead >= -BEHIND
        elif abs(other.lane) == 1 and abs(other.ahead) <= BESIDE:
            found["left_vehicle" if other.lane < 0 else "right_vehicle"] = True
    return found


def mirrored(scene: Scene) -> Scene:
    """The scene with left and right exchanged."""
    old = scene.plan
    objects = old["critical_objects"]
    behaviors = old["future_meta_behavior"]
    new = {
        "critical_objects": {name: objects[_swapped(name)] for name in objects},
        "explanation": _swapped(old["explanation"]),
        "future_meta_behavior": behaviors | {"lateral": _swapped(behaviors["lateral"])},
        "trajectory": [[x, 0.0 - y] for x, y in old["trajectory"]],
    }
    images = tuple(np.ascontiguousarray(image[:, ::-1]) for image in scene.images[::-1])
    return Scene(images, [m._replace(y=-m.y) for m in scene.history], new)


def _swapped(text: str) -> str:
    """The text with the words left and right exchanged."""
    return re.sub("left|right", lambda found: SWAP[found[0]], text)


def _written(out: Path, number: int, scene: Scene) -> dict[str, Any]:
    """Row of a scene, whose images are written to files."""
    names = []
    for camera, image in zip(CAMERAS, scene.images, strict=True):
        names.append(f"images/{number:06}_{camera}.png")
        Image.fromarray(image).save(out / names[-1])
    question = "<image>\n" * len(names) + prompt(scene.history)
    answer = json.dumps(scene.plan, indent=2)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": names, "conversations": turns}
