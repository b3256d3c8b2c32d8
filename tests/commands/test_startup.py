"""Processor time of short commands, over that of `import torch` in the same run."""

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
BARS = {"list": 1.2, "info tiny": 1.2, "caption one.png": 1.7}
ATTEMPTS = 3  # on a busy machine processor time varies by a tenth
ROUNDS = 3  # the median drops the first, which may write compiled files


def processor_seconds(folder: Path, *arguments: str) -> float:
    """User and system time of one Python process and its children."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def within_bars(ratios: dict[str, float]) -> bool:
    return all(ratios[command] <= bar for command, bar in BARS.items())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs resource usage of child processes")
def test_short_commands_start_quickly(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    runs = {"import torch": ["-c", "import torch"]}
    runs |= {command: ["-m", "mmdlm", *command.split()] for command in BARS}
    measured = []
    while len(measured) < ATTEMPTS and not (measured and within_bars(measured[-1])):
        rounds = [
            {name: processor_seconds(tmp_path, *arguments) for name, arguments in runs.items()}
            for _ in range(ROUNDS)
        ]
        # Each command against the import of torch in its round: other processes slow both down.
        measured.append(
            {
                command: statistics.median(each[command] / each["import torch"] for each in rounds)
                for command in BARS
            }
        )
    assert within_bars(measured[-1]), f"bars {BARS} over the import of torch, measured {measured}"


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        ("list", {"torch", "transformers"}),
        ("info tiny", {"timm", "torchvision", "torchaudio", "transformers", "jinja2", "lightning"}),
        ("caption one.png", {"timm", "torchvision", "torchaudio", "transformers", "lightning"}),
    ],
)
def test_short_commands_import_only_what_they_use(
    command: str, unused: set[str], tmp_path: Path
) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "one.png")
    code = (
        "import sys; from mmdlm.commands.main import main; code = main(sys.argv[1:])\n"
        "print('imported', *sys.modules); sys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    imported = run.stdout.rpartition("imported ")[2].split()
    assert not unused & {*imported}, unused & {*imported}
    assert "torch._dynamo" not in imported
