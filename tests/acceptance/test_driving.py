"""A user records a rule-based driver, trains a model on its plans, and lets the model drive.

The commands are those of the README. Run with -m slow -s.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("highway_env", reason='pip install "mmdlm[sim]"')

EPISODES = 20
LIMIT = 900
"""Processor seconds of the training."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, command: Callable) -> dict[str, dict]:
    """Result of each driver over the same seeds."""
    folder: Path = tmp_path_factory.mktemp("driving")
    command(folder, "data", "make", "driving", "data/driving")
    ran = command(folder, "fit", "-c", "train/driving")
    assert ran.processor_seconds < LIMIT
    last = "runs/driving/version_0/checkpoints/last.ckpt"
    command(folder, "export", last, "--out", "my-driver")
    words = ("--episodes", EPISODES, "--out", "drive.json")
    ran = command(folder, "drive", "--model", "./my-driver", *words)
    print(ran.out)
    results = json.loads((folder / "drive.json").read_text())["results"]
    return {result["name"]: result for result in results}


@pytest.mark.slow
def test_drivers_are_compared_over_the_same_seeds(found: dict[str, dict]) -> None:
    """Without a collision only the rule-based driver: 0 of 20, constant speed 20 of 20."""
    seeds = {name: [one["seed"] for one in each["drives"]] for name, each in found.items()}
    assert list(seeds.values()) == [list(range(EPISODES))] * 3
    assert found["rule-based"]["collisions"] == 0
    assert found["constant speed"]["collisions"] == EPISODES
    assert found["policy"]["plan_ms"] > 0


@pytest.mark.slow
def test_a_trained_model_collides_less_than_constant_speed(found: dict[str, dict]) -> None:
    """It reacts to what it sees: with constant speed every episode ends in a collision."""
    assert found["policy"]["collisions"] < EPISODES
    assert found["policy"]["speed"] > 10
