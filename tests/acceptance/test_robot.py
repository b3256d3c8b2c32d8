"""A user records a task that the bundled policy does not know, and fine-tunes on it.

The commands are those of the README. Run with -m slow -s.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import mmdlm
from mmdlm.checkpoint import save
from mmdlm.training.vocabulary import grow

pytest.importorskip("metaworld", reason='pip install "mmdlm[sim]"')
pytest.importorskip("pyarrow", reason='pip install "mmdlm[data]"')

SIM, DATA = "metaworld/faucet-open", "data/robot"
EPISODES = 20
LIMIT = 2 * 600
"""Processor seconds of ten minutes on two cores."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, command: Callable) -> Path:
    """A folder with recorded episodes of the task."""
    root = tmp_path_factory.mktemp("robot")
    words = ("--tasks", "faucet-open", "--episodes", 30)
    command(root, "data", "make", "episodes", DATA, *words)
    return root


@pytest.fixture(scope="module")
def full(folder: Path, command: Callable) -> float:
    """Success after full fine-tuning."""
    ran = command(folder, *fit("policy"))
    assert ran.processor_seconds < LIMIT
    assert f"mmdlm act --sim SIMULATOR --model {model('policy')}" in ran.err
    return success(folder, command, "--model", model("policy"))


def fit(config: str) -> list[str]:
    """Words of the command that trains on the recorded episodes."""
    data = ["--source", "tiny", "--data", DATA]
    return ["fit", "-c", f"finetune/{config}", *data, "--out", config]


def model(config: str) -> str:
    """Folder that a run leaves."""
    return f"{config}/finetune/version_0/model"


def success(folder: Path, command: Callable, *options: str) -> float:
    """Share of successful episodes, seeds 0 to 19, in [0, 1]."""
    command(folder, "act", "--sim", SIM, "--episodes", EPISODES, "--out", "act.json", *options)
    found = json.loads((folder / "act.json").read_text())[0]
    assert found["count"] == EPISODES
    return found["rate"]


@pytest.mark.slow
def test_the_bundled_policy_does_not_know_the_task(folder: Path, command: Callable) -> None:
    """0 of 20, 2026-11-29; its vocabulary lacks "faucet", so the word is added without training."""
    policy = mmdlm.load("tiny", device="cpu", pack=False)
    assert grow(policy, ["faucet"]) == ["faucet"]
    save(policy, folder / "untrained")
    assert success(folder, command, "--model", "./untrained") == 0


@pytest.mark.slow
def test_full_fine_tuning_learns_the_task(full: float) -> None:
    """15 of 20 after 600 steps, the default, in 325 processor seconds (AMD EPYC, 2026-11-29).

    The difference to the recorded actions of held-out frames fell from 40.1 to 15.6 % of their
    range.
    """
    assert full >= 0.6


@pytest.mark.slow
def test_lora_learns_the_task_too(folder: Path, command: Callable, adapted: Callable) -> None:
    """13 of 20 after 600 steps, the default, and after 1000 (AMD EPYC, 2026-11-29).

    Full fine-tuning had 15 of 20, so "within 5 points" is not shown; 20 episodes tell a share to
    about 20 points. The adapter has 3.8 % of the parameters.
    """
    ran = command(folder, *fit("policy_lora"))
    assert ran.processor_seconds < LIMIT
    adapter = model("policy_lora")
    options = ("--model", "tiny", "--adapter", adapter)
    assert success(folder, command, *options) >= 0.6
    command(folder, "export", "tiny", "--adapter", adapter, "--out", "merged")
    found = adapted(folder / adapter, folder / "merged")
    assert found.share <= 0.05
    assert max(found.peft, found.load) < 1e-5
