"""Policies in simulators: episodes, success rates with every setting that moves them."""

from __future__ import annotations

import json
import math
import os
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
from mmdlm.recipe import recipe
from mmdlm.simulators import video as films
from mmdlm.simulators.simulator import Simulator, open_simulator
from mmdlm.tasks.act import Policy, load_policy

TRAINED = "trained"  # stands for every task the checkpoint says it was trained on
DISTRIBUTIONS = ("torch", "numpy", "mujoco", "metaworld", "gymnasium", "gym-pusht")


class Acts(Protocol):
    """What a rollout needs of a policy; `mmdlm.tasks.act.Policy` has it, clients may."""

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """A dict with "actions" float32 [K A] and "timing"."""

    def reset(self) -> None:
        """Called at the start of every episode."""


@dataclass(frozen=True)
class Episode:
    """What happened in one episode.

    Args:
        seed: of the simulator.
        success: whether the goal was reached at any step.
        steps: actions played.
        reward: sum over the steps.
        queries: how often the policy was asked.
        clipped: actions outside the robot's limits, which were clipped.
        infer_ms: median wall time of a query in milliseconds.
        forwards: of the backbone per query, mean; 0 for policies that do not tell.
        frames: one picture per step, enlarged and captioned; empty unless asked for.
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
        name: of the simulator.
        episodes: in the order of their seeds.
        settings: everything that moves the number.
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
    """The 95 % interval of a rate, Wilson's score (J. Am. Stat. Assoc. 22, 1927): (low, high).

    Args:
        successes: 0 to `count`.
        count: tries, at least one.
    """
    if not 0 <= successes <= count or count < 1:
        raise ValueError(
            f"wilson: {successes} successes of {count}; expected 0 to count, count > 0"
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
    """One episode, from the reset to success or the horizon.

    Args:
        policy: anything with `infer` and `reset`.
        simulator: an open one; it stays open.
        seed: of the simulator.
        execute: actions of each chunk that are played before the policy is asked again.
        film: keep a picture of every step.
    Raises:
        ValueError: `execute` is longer than the chunk, or actions do not fit the robot.
    """
    obs, done, success, reward, steps = simulator.reset(seed), False, False, 0.0, 0
    policy.reset()
    times: list[float] = []
    forwards = 0
    frames = [_shot(obs, simulator, 0, None)] if film else []
    while not done:
        begin = time.perf_counter()
        answer = policy.infer(obs)
        times.append(1e3 * (time.perf_counter() - begin))
        actions = answer["actions"]
        forwards += answer.get("timing", {}).get("forwards", 0)
        if not 1 <= execute <= len(actions):
            raise ValueError(f"execute is {execute}, expected 1 to {len(actions)}, the chunk")
        for i, action in enumerate(actions[:execute], 1):
            obs, gained, success, done = simulator.step(action, look=film or i == execute)
            reward, steps = reward + gained, steps + 1
            if film:
                frames.append(_shot(obs, simulator, steps, success if success or done else None))
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


def _shot(obs: dict[str, Any], simulator: Simulator, step: int, good: bool | None) -> np.ndarray:
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
        name: of the simulator, see `mmdlm.simulators.simulator.open_simulator`.
        seeds: one episode each; demonstrations start at 1000, so keep below.
        execute: actions of each chunk that are played before the policy is asked again.
        horizon: steps of an episode; None for the simulator's own.
        size: side of the picture in pixels; None for what the policy's image encoder takes.
        render_quality: of Meta-World: "default", "near" or "fast"; use what the policy was trained
            with ("fast" for the bundled one).
        filmed: how many of the first episodes keep their pictures.
        progress: show a progress bar.
    Raises:
        ValueError: there are no seeds, no such simulator, or the robot differs from the policy's.
    """
    if not len(seeds):
        raise ValueError("evaluate: no seeds; give at least one")
    side = size or _side(policy)
    options = {"horizon": horizon, "size": side}
    if name.startswith("metaworld"):
        options["render_quality"] = render_quality
    options = {key: value for key, value in options.items() if value is not None}
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
    """Side of the pictures the policy's image encoder takes, None when it does not say."""
    encoders = policy.model.encoders
    return getattr(encoders["image"], "size", None) if "image" in encoders else None


def _check_robot(policy: Policy, simulator: Simulator, name: str) -> None:
    robot = policy.robot
    sizes = (robot.action_size, robot.state.size)
    if sizes != (simulator.action_size, simulator.state_size):
        raise ValueError(
            f"{name} has actions of {simulator.action_size} and state of {simulator.state_size} "
            f"numbers, the policy of {sizes[0]} and {sizes[1]}; it was trained on another robot"
        )


def _settings(
    policy: Policy, simulator: Simulator, name: str, options: dict[str, Any], execute: int
) -> dict[str, Any]:
    """Everything that moves a success rate, in plain types."""
    found: dict[str, Any] = {
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
        "versions": {"python": platform.python_version(), "mmdlm": mmdlm.__version__} | _versions(),
    }
    if name.startswith("metaworld"):
        from mmdlm.simulators.metaworld import CAMERA, CAMERA_POSITION

        found["gl"] = os.environ.get("MUJOCO_GL")
        found["camera"] = {"name": CAMERA, "position": list(CAMERA_POSITION)}
    return found


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed has had no part in the result
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
) -> int:
    """Drives robots in simulation and prints one line of success per task.

    Args:
        sim: simulators, separated by commas: "toy", "pusht", "metaworld/TASK"; "trained" for every
            task the checkpoint was trained on.
        episodes: episodes per task.
        model: bundled name, folder or hub id of a policy.
        seed: seed of the first episode; the others count up.
        execute: actions of each chunk that are played before the policy is asked again.
        horizon: steps of an episode; null for the simulator's own.
        decoding: decoding preset; by default the checkpoint's.
        video: folder for an mp4 of the first episode of each task, or a file ending in .mp4.
        out: JSON file for the results, with every setting.
        render_quality: of Meta-World; take what the policy was trained with.
        device: "auto", "cpu", "cuda".
    Returns:
        0, whatever the robot did.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}, expected at least 1")
    policy = load_policy(model, device=device)
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
            print(f"  {save_film(result, video, len(names))}")
        results.append(replace(result, settings={"model": model, **result.settings}))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([result.to_dict() for result in results], indent=2)
        out.write_text(text + "\n", encoding="utf-8")
    return 0


def simulators(sim: str | Items[str], policy: Policy) -> list[str]:
    """Names of simulators from what a user typed.

    Args:
        sim: names, or one text with names separated by commas; "trained" stands for the policy's.
        policy: whose tasks "trained" means.
    Raises:
        ValueError: nothing was named, or the checkpoint does not say what it was trained on.
    """
    typed = sim.split(",") if isinstance(sim, str) else list(sim)
    names: list[str] = []
    for name in filter(None, map(str.strip, typed)):
        if name != TRAINED:
            names.append(name)
            continue
        if not policy.tasks:
            raise ValueError(
                f"{TRAINED!r}: this checkpoint does not say its tasks; name them, for example "
                "metaworld/drawer-close"
            )
        names += [
            task if "/" in task or task == "toy" else f"metaworld/{task}" for task in policy.tasks
        ]
    if not names:
        raise ValueError(f"sim is {sim!r}; name a simulator, for example metaworld/drawer-close")
    return list(dict.fromkeys(name.removesuffix("-v3") for name in names))


def save_film(result: Result, video: Path, tasks: int = 1) -> Path:
    """The path of the mp4 of a result's first episode, whose frames must have been kept.

    Args:
        result: of `evaluate` with `filmed` at least 1.
        video: a folder, or a file ending in .mp4 where there is one task.
        tasks: number of tasks that are written to `video`.
    Raises:
        ValueError: several tasks would write the same file.
    """
    episode = result.episodes[0]
    if video.suffix == ".mp4" and tasks > 1:
        raise ValueError(f"video is one file, {video}, for {tasks} tasks; give a folder")
    file = f"{result.name.replace('/', '-')}-seed{episode.seed}.mp4"
    path = video if video.suffix == ".mp4" else video / file
    return films.write(path, episode.frames)
