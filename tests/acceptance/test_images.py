"""Fine-tuning on 60 photographs with captions, as the README describes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
SECONDS = 1200.0
"""Processor seconds that a run may take: ten minutes on two cores."""
CAPTIONS = {
    "astronaut.png": "Eileen Collins smiles in her orange suit.",
    "brick.png": "A brick wall, 12 rows high.",
    "camera.png": "The man with a camera stands on a lawn.",
    "chelsea.png": "Chelsea the cat looks at you!",
    "coffee.png": "An espresso in a cup, with a spoon.",
    "coins.png": "Old coins from Pompeii.",
    "hubble_deep_field.jpg": "Galaxies, seen by Hubble in 1995.",
    "motorcycle_left.png": "A motorcycle in somebody's garage.",
    "retina.jpg": "The retina of an eye.",
    "rocket.jpg": "A Falcon-9 rocket leaves the pad.",
}
"""Captions of photographs that scikit-image brings along, most words of which `tiny` lacks."""


def write(folder: Path, crops: int, rng: np.random.Generator) -> None:
    """Writes crops of each photograph at random places, with their captions beside them."""
    skimage = pytest.importorskip("skimage", reason='pip install "mmdlm[dev]"')
    folder.mkdir()
    for name, caption in CAPTIONS.items():
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        for number in range(crops):
            side = int(min(image.size) * rng.uniform(0.6, 0.95))
            left, top = (int(rng.integers(0, size - side + 1)) for size in image.size)
            crop = image.crop((left, top, left + side, top + side)).resize((128, 128))
            stem = f"{Path(name).stem}_{number}"
            crop.save(folder / f"{stem}.png")
            (folder / f"{stem}.txt").write_text(caption)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with six crops of each of ten photographs, unseen/ with four others."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    write(folder / "train", 6, rng)
    write(folder / "unseen", 4, rng)
    return folder


@pytest.fixture(scope="module")
def full(folder: Path, tune: Callable) -> Any:
    return tune(folder, "finetune/full", "train", "--steps", 200)


@pytest.fixture(scope="module")
def lora(folder: Path, tune: Callable) -> Any:
    return tune(folder, "finetune/lora", "train")


def test_full_fine_tuning_learns_the_captions(folder: Path, full: Any, score: Callable) -> None:
    """Train 98 %, other crops 90 % of 40 (before: 0 %); 95 processor seconds for 200 steps.

    AMD EPYC, 2026-11-29, one thread of two cores shared with other programs, where the run took
    9 minutes. 600 steps at a third of the learning rate: 98 and 80 %, 277 processor seconds.
    """
    assert full.ran.processor_seconds < SECONDS
    assert score(folder, "unseen") == 0
    assert score(folder, "train", *full.model) >= 0.9
    assert score(folder, "unseen", *full.model) >= 0.5


def test_lora_learns_them_as_well(
    folder: Path, full: Any, lora: Any, command: Callable, score: Callable, adapted: Callable
) -> None:
    """Train 97 %, other crops 83 % of 40 (before: 0 %); 190 processor seconds.

    AMD EPYC, 2026-11-29, one thread of two cores shared with other programs, where the run took
    17 minutes.
    """
    assert lora.ran.processor_seconds < SECONDS
    found = score(folder, "train", *lora.model)
    assert found >= 0.9
    assert found >= score(folder, "train", *full.model) - 0.05
    assert score(folder, "unseen", *lora.model) >= 0.5
    adapter = lora.model[-1]
    command(folder, "export", "tiny", "--adapter", adapter, "--out", "merged")
    found = adapted(Path(adapter), folder / "merged")
    assert found.share <= 0.05
    assert found.peft <= 1e-5
    assert found.load <= 1e-5


def test_the_printed_command_captions(folder: Path, full: Any, command: Callable) -> None:
    """The last line that fit prints is a command for images of the user."""
    words = [word.replace("IMAGE", "train/chelsea_0.png") for word in full.use]
    assert command(folder, *words).out.strip().endswith("Chelsea the cat looks at you!")
