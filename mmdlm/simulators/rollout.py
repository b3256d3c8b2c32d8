"""Runs policies in simulators and reports success rates with all settings."""

from __future__ import annotations

import inspect
import json
import math
import platform
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from tqdm import tqdm

import mmdlm
from mmdlm.atomic import write_text
from mmdlm.recipe import recipe
from mmdlm.simulators import video as films
from mmdlm.simulators.simulator import Simulator, full_name, open_simulator, simulator_class
from mmdlm.tasks.act import Policy, load_policy

TRAINED = "trained"  # all tasks listed in the checkpoint
DISTRIBUTIONS = ("torch", "numpy", "mujoco", "metaworld", "gymnasium", "gym-pusht", "highway-env")


class Acts(Protocol):
    """Protocol of a policy in a rollout; `mmdlm.tasks.act.Policy` implements it."""

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """A dict with "actions" float32 [K A] and "timing"."""

    def reset(self) -> None:
        """Called at the start of every episode."""


@dataclass(frozen=True)
class Episode:
    """Outcome of one episode.

    Args:
        seed: seed of the simulator.
        success: whether the goal was reached at any step.
        steps: number of executed actions.
        reward: sum over the steps.
        queries: number of calls of the policy.
        clipped: number of actions outside the robot's limits, which were clipped.
        infer_ms: median wall time of a query in milliseconds.
        forwards: mean backbone forwards per query; 0 for policies that do not report it.
        frames: one image per step, enlarged and captioned; empty unless requested.
    """

    seed: int
    success: bool
    steps: int
    reward: float
    queries: int
    clipped: int
    infer_ms: float
    forwards: float = 0.0
    frames: tuple[np.ndarray, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types, without the frames."""
        kept = {k: v for k, v in vars(self).items() if k != "frames"}
        return kept | {"reward": round(self.reward, 4), "infer_ms": round(self.infer_ms, 2)}


@dataclass(frozen=True)
class Result:
    """Success of a policy on one task.

    Args:
        name: name of the simulator.
        episodes: in the order of their seeds.
        settings: everything the rate depends on.
    """

    name: str
    episodes: tuple[Episode, ...]
    settings: dict[str, Any]

    @property
    def successes(self) -> int:
        """Episodes that reached the goal."""
        return sum(episode.success for episode in self.episodes)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the success rate, in [0, 1]."""
        return wilson(self.successes, len(self.episodes))

    def __str__(self) -> str:
        n, (low, high) = len(self.episodes), self.interval
        share = 100 * self.successes / n
        return (
            f"{self.name}: {self.successes}/{n} = {share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types for a JSON file."""
        return {
            "name": self.name,
            "successes": self.successes,
            "count": len(self.episodes),
            "rate": self.successes / len(self.episodes),
            "interval": list(self.interval),
            "settings": self.settings,
            "episodes": [episode.to_dict() for episode in self.episodes],
        }


def wilson(successes: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate (J. Am. Stat. Assoc. 22, 1927): (low, high).

    Args:
        successes: 0 to `count`.
        count: number of trials, at least 1.
    """
    if not 0 <= successes <= count or count < 1:
        raise ValueError(
            f"wilson: {successes} successes of {count}, expected 0 to count and count > 0"
        )
    z = 1.959964  # 97.5th percentile of the normal distribution
    share = successes / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def rollout(
    policy: Acts, simulator: Simulator, seed: int, execute: int = 4, film: bool = False
) -> Episode:
    """Runs one episode from the reset to success or the horizon.

    Args:
        policy: anything with `infer` and `reset`.
        simulator: an open simulator; it stays open.
        seed: seed of the simulator.
        execute: actions of each chunk to execute before the next query.
        film: keep an image of every step.
    Raises:
        ValueError: `execute` is longer than the chunk, or the actions do not fit the robot.
    """
    obs, done, success, reward, steps = simulator.reset(seed), False, False, 0.0, 0
    policy.reset()
    times: list[float] = []
    forwards = 0
    frames = [_frame(obs, simulator, 0, None)] if film else []
    while not done:
        begin = time.perf_counter()
        answer = policy.infer(obs)
        times.append(1e3 * (time.perf_counter() - begin))
        actions = answer["actions"]
        forwards += answer.get("timing", {}).get("forwards", 0)
        if not 1 <= execute <= len(actions):
            raise ValueError(f"execute is {execute}, expected 1 to {len(actions)}, the chunk")
        for i, action in enumerate(actions[:execute], 1):
            obs, gained, success, done = simulator.step(action, observe=film or i == execute)
            reward, steps = reward + gained, steps + 1
            if film:
                frames.append(_frame(obs, simulator, steps, success if success or done else None))
            if done:
                break
    return Episode(
        seed,
        success,
        steps,
        reward,
        len(times),
        simulator.clipped,
        float(np.median(times)),
        forwards / len(times),
        tuple(frames),
    )


def _frame(obs: dict[str, Any], simulator: Simulator, step: int, good: bool | None) -> np.ndarray:
    state = "" if good is None else "  success" if good else "  not reached"
    line = f"step {step} of {simulator.horizon}{state}"
    return films.annotate(obs["image"], [simulator.instruction, line], good)


def evaluate(
    policy: Policy,
    name: str,
    seeds: Items[int] = range(20),
    execute: int = 4,
    horizon: int | None = 200,
    size: int | None = None,
    render_quality: str = "fast",
    filmed: int = 0,
    progress: bool = True,
) -> Result:
    """Success of a policy on one task over several seeds.

    Args:
        policy: the policy.
        name: see `mmdlm.simulators.simulator.open_simulator`.
        seeds: one episode each; demonstrations use seeds from 1000, so stay below.
        execute: actions of each chunk to execute before the next query.
        horizon: steps of an episode; None: the default of the simulator.
        size: side of the image in pixels; None: the size the policy's image encoder takes.
        render_quality: of Meta-World: "default", "near" or "fast"; use the one of the training data
            ("fast" for the bundled model).
        filmed: number of episodes, from the first, whose frames are kept.
        progress: show a progress bar.
    Raises:
        ValueError: there are no seeds, the simulator is unknown, or the robots differ.
    """
    if not len(seeds):
        raise ValueError("evaluate: no seeds; give at least one")
    side = size or _side(policy)
    options = {"horizon": horizon, "size": side, "render_quality": render_quality}
    known = inspect.signature(simulator_class(name)).parameters
    options = {k: v for k, v in options.items() if v is not None and k in known}
    with open_simulator(name, **options) as simulator:
        _check_robot(policy, simulator, name)
        bar = tqdm(seeds, desc=name, disable=not progress, leave=False)
        episodes, won = [], 0
        for i, seed in enumerate(bar):
            episodes.append(rollout(policy, simulator, int(seed), execute, film=i < filmed))
            won += episodes[-1].success
            bar.set_postfix_str(f"{won} of {i + 1}")
        found = _settings(policy, simulator, name, options, execute)
    return Result(name, tuple(episodes), found)


def _side(policy: Policy) -> int | None:
    """Image size of the policy's image encoder; None if it has no fixed size."""
    encoders = policy.model.encoders
    return getattr(encoders["image"], "size", None) if "image" in encoders else None


def _check_robot(policy: Policy, simulator: Simulator, name: str) -> None:
    robot = policy.robot
    reads_state = "state" in policy.model.encoders
    size = robot.state.size if reads_state else simulator.state_size
    if (robot.action_size, size) != (simulator.action_size, simulator.state_size):
        raise ValueError(
            f"{name} has actions of {simulator.action_size} and state of {simulator.state_size} "
            f"numbers, the policy {robot.action_size} and {size}; it was trained on another robot"
        )


def _settings(
    policy: Policy, simulator: Simulator, name: str, options: dict[str, Any], execute: int
) -> dict[str, Any]:
    """Everything the success rate depends on, in plain types."""
    return {
        "simulator": name,
        "instruction": simulator.instruction,
        **options,
        "horizon": simulator.horizon,
        "chunk": policy.robot.chunk,
        "execute": execute,
        "strategies": [recipe(strategy) for strategy in policy.strategies],
        "device": str(policy.model.device),
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "mmdlm": mmdlm.__version__} | versions(),
        **simulator.settings(),
    }


def versions() -> dict[str, str]:
    """Versions of the installed libraries that a result may depend on."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # not installed, so not used
    return found


def act(
    sim: str | list[str] = "metaworld/drawer-close",
    episodes: int = 20,
    model: str = "tiny",
    seed: int = 0,
    execute: int = 4,
    horizon: int | None = 200,
    decoding: str | None = None,
    video: Path | None = None,
    out: Path | None = None,
    render_quality: Literal["default", "near", "fast"] = "fast",
    device: str = "auto",
    adapter: str | None = None,
) -> int:
    """Run a policy in simulators and print the success rate per task.

    Args:
        sim: simulators, separated by commas: "toy", "pusht", "metaworld/TASK"; "trained": all tasks
            of the checkpoint.
        episodes: episodes per task.
        model: bundled name, folder or hub id of a policy.
        seed: seed of the first episode; the following ones count up.
        execute: actions of each chunk to execute before the next query.
        horizon: steps of an episode; null: the default of the simulator.
        decoding: decoding preset; by default the checkpoint's.
        video: folder for an mp4 of the first episode of each task, or a file ending in .mp4.
        out: JSON file for the results, with every setting.
        render_quality: of Meta-World; use the one of the training data.
        device: "auto", "cpu", "cuda".
        adapter: folder or hub id of a LoRA adapter of the model, merged into its weights.
    Returns:
        0, independent of the success.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}, expected at least 1")
    policy = load_policy(model, device=device, adapter=adapter)
    made_with = {"model": model} | ({} if adapter is None else {"adapter": adapter})
    if decoding is not None:
        policy = Policy(policy.model, policy.execute, decoding)
    names = simulators(sim, policy)
    results = []
    for name in names:
        result = evaluate(
            policy,
            name,
            range(seed, seed + episodes),
            execute,
            horizon,
            render_quality=render_quality,
            filmed=int(video is not None),
        )
        print(result, flush=True)
        if video is not None:
            print(f"  {save_video(result, video, len(names))}")
        results.append(replace(result, settings=made_with | result.settings))
    if out is not None:
        write_text(out, json.dumps([result.to_dict() for result in results], indent=2) + "\n")
    return 0


def simulators(sim: str | Items[str], policy: Policy) -> list[str]:
    """Parses the names of simulators.

    Args:
        sim: names, or a string of names separated by commas; "trained": all tasks of the policy.
        policy: the policy.
    Raises:
        ValueError: there is no name, or the checkpoint lists no tasks.
    """
    typed = sim.split(",") if isinstance(sim, str) else list(sim)
    names: list[str] = []
    for name in filter(None, map(str.strip, typed)):
        if name != TRAINED:
            names.append(name)
            continue
        if not policy.tasks:
            raise ValueError(
                f"{TRAINED!r}: this checkpoint lists no tasks; name them, for example "
                "metaworld/drawer-close"
            )
        names += map(full_name, policy.tasks)
    if not names:
        raise ValueError(
            f"sim is {sim!r}, expected a simulator, for example metaworld/drawer-close"
        )
    return list(dict.fromkeys(name.removesuffix("-v3") for name in names))


def save_video(result: Result, video: Path, tasks: int = 1) -> Path:
    """Writes an mp4 of the first episode of a result and returns its path.

    Args:
        result: result of `evaluate` with `filmed` at least 1.
        video: a folder, or a file ending in .mp4 if there is one task.
        tasks: number of tasks written to `video`.
    Raises:
        ValueError: `video` is one file for several tasks.
    """
    episode = result.episodes[0]
    if video.suffix == ".mp4" and tasks > 1:
        raise ValueError(f"video is one file, {video}, for {tasks} tasks; give a folder")
    file = f"{result.name.replace('/', '-')}-seed{episode.seed}.mp4"
    path = video if video.suffix == ".mp4" else video / file
    return films.write(path, episode.frames)
