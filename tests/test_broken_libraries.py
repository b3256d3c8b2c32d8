"""A library that does not load makes only what needs it unavailable."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

ROOT = Path(__file__).parent.parent
WITHOUT_AUDIO = """
import numpy as np
import mmdlm
from mmdlm.commands.main import main

for command in (
    ["list"],
    ["info", "tiny"],
    ["caption", "image.png"],
    ["answer", "image.png", "--question", "how many shapes are there ?"],
    ["embed", "image.png", "--json"],
):
    assert main(command) == 0, command
policy = mmdlm.load_policy("tiny")
image = np.zeros((64, 64, 3), np.uint8)
given = {"image": image, "state": np.zeros(4), "prompt": "close the drawer"}
actions = policy.infer(given)["actions"]
assert np.isfinite(actions).all() and actions.ndim == 2
assert main(["transcribe", "clip.wav", "again.wav"]) == 2
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs Python code beside an image and clips, with a broken library."""
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "image.png")
    for name in ("clip.wav", "again.wav"):
        soundfile.write(tmp_path / name, 0.1 * np.sin(np.arange(16_000)), 16_000)

    def run(broken: str, error: str, code: str) -> subprocess.CompletedProcess[str]:
        fake = tmp_path / "fake" / broken
        fake.mkdir(parents=True)
        (fake / "__init__.py").write_text(error)
        path = os.pathsep.join([str(tmp_path / "fake"), str(ROOT)])
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )

    return run


def test_without_torchaudio_only_audio_is_unavailable(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    error = "raise OSError('Could not load this library: libtorchaudio.so')"
    done = run("torchaudio", error, WITHOUT_AUDIO)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("mmdlm: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mmdlm: error: audio needs torchaudio, which does not load")
    assert "Could not load this library: libtorchaudio.so" in lines[0]
    assert 'pip install "torchaudio' in lines[0]
