"""The estimate of memory against the measured peak of two real steps in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.layout import Row, Turn
from mmdlm.model import MultimodalDLM
from mmdlm.training import lora, tune
from mmdlm.training.memory import Memory, Shape, estimate
from mmdlm.training.optimizer import AdamW
from mmdlm.training.tune import Lora, Rate

ROOT = Path(__file__).parents[2]
# (rows, prompt, answer, vocabulary, width, layers, checkpointing)
CONFIGS = {
    "activations": (6, 96, 96, 2000, 192, 4, False),
    "logits": (4, 32, 96, 20_000, 96, 2, False),
    "checkpointing": (6, 96, 96, 2000, 192, 6, True),
}


def model(name: str) -> MultimodalDLM:
    _, _, _, vocab, width, layers, checkpointing = CONFIGS[name]
    config = TransformerConfig(width=width, layers=layers, heads=4, inner=4 * width, vocab=vocab)
    made = MultimodalDLM(Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0, attention="prefix"))
    made.backbone.checkpointing = checkpointing
    return made.train()


def rows(name: str) -> list[Row]:
    count, prompt, answer, *_ = CONFIGS[name]
    turn = Turn(torch.full((prompt,), 5), torch.full((answer,), 6))
    return [Row((), (turn,))] * count


@cache
def estimated(name: str) -> dict[str, Memory]:
    made = model(name)
    return estimate(made, [Shape.of(made.arrange(rows(name)), [])], AdamW())


def measure(name: str) -> float:
    """Peak of the resident memory above that before the model, in bytes, during two steps."""
    from mmdlm.objectives.masked import Masked
    from mmdlm.objectives.objective import Batch

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def step(made: MultimodalDLM, given: list[Row], optimizer: torch.optim.Optimizer) -> None:
        seeds, phase = torch.arange(len(given)), torch.zeros(len(given), dtype=torch.float64)
        objective = Masked(full=1.0)
        loss = objective.step(made, Batch(made.arrange(given), seeds, phase)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    torch.set_num_threads(1)
    CONFIGS["small"] = (2, 4, 4, 50, 64, 1, CONFIGS[name][-1])
    warm = model("small")  # what libraries allocate once
    step(warm, rows("small"), torch.optim.AdamW(warm.parameters(), fused=True))
    before, peak, done = resident(), 0, False

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, resident())
            time.sleep(0.001)

    made = model(name)
    optimizer = torch.optim.AdamW(made.parameters(), fused=True)
    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2):
        step(made, rows(name), optimizer)
    done = True
    watcher.join()
    return peak - before


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    # Freed blocks go back to the system at once, so that the resident memory is what is alive.
    thresholds = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env = {**os.environ, **thresholds, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(line) for line in run.stdout.splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", CONFIGS)
def test_estimate_is_within_15_percent_of_the_measured_peak(
    name: str, measured: dict[str, float]
) -> None:
    assert estimated(name)["full"].peak == pytest.approx(measured[name], rel=0.15)


def test_parts_add_up_and_lora_needs_less() -> None:
    full, low, quantized = estimated("activations").values()
    made = model("activations")
    assert full.trained == sum(p.numel() for p in made.parameters())
    assert full.weights == full.gradients == 4 * full.trained
    assert full.optimizer == pytest.approx(2 * full.weights, rel=0.01)
    for one in (full, low, quantized):
        parts = one.weights + one.gradients + one.optimizer + one.activations
        assert one.peak == pytest.approx(parts, abs=1)
    assert low.trained < 0.1 * full.trained
    assert low.peak < full.peak
    assert quantized.weights < low.weights
    assert quantized.peak < low.peak
    assert made.training  # the model is not changed


def test_every_run_is_compared_with_the_same_ways_to_train() -> None:
    rules = {"*": "frozen", "backbone.blocks.*": Rate(lora=Lora(rank=4))}
    made = model("logits")
    tune.freeze(made, rules)
    lora.inject(made, rules, 3, "source")  # with three new words
    found = estimate(made, [Shape.of(made.arrange(rows("logits")), [])], AdamW(), rules)
    plain = estimated("logits")
    assert list(found) == ["full", "LoRA, rank 4", "LoRA on 8 bits"]
    assert found["full"].trained == plain["full"].trained
    assert found["full"].peak == pytest.approx(plain["full"].peak, rel=0.01)
    trained = sum(each.numel() for _, each in lora.trainable(made))
    assert found["LoRA, rank 4"].trained == found["LoRA on 8 bits"].trained == trained
    for kind in ("weights", "peak"):
        values = [getattr(one, kind) for one in found.values()]
        assert values[2] < values[1]
    frozen = {"*": "frozen", "backbone.blocks.1.*": Rate()}
    made = model("logits")
    tune.freeze(made, frozen)
    found = estimate(made, [Shape.of(made.arrange(rows("logits")), [])], AdamW(), frozen)
    assert list(found) == ["as configured", "full", "LoRA, rank 16", "LoRA on 8 bits"]
    assert found["as configured"].trained < found["full"].trained
    assert found["full"] == plain["full"]


def test_checkpointing_and_half_precision_lower_the_estimate() -> None:
    name = "checkpointing"
    made = model(name)
    shapes = [Shape.of(made.arrange(rows(name)), [])]
    kept = estimated(name)["full"]
    made.backbone.checkpointing = False
    assert estimate(made, shapes, AdamW())["full"].activations > 2 * kept.activations
    half = estimate(made, shapes, AdamW(), precision="bf16-true")["full"]
    assert half.weights == kept.weights // 2


if __name__ == "__main__":  # a fresh process for each, without importing torch again
    for each in list(CONFIGS):
        if not (child := os.fork()):
            print(json.dumps([each, measure(each)]), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
