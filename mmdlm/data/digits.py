"""Handwritten digits: 1797 scans of 8 x 8 pixels that come with scikit-learn.

The scans are the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak, 1998), 43 writers, values 0 to 16. No download is needed.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from PIL import Image

from mmdlm.data.dataset import Dataset, example
from mmdlm.messages import Example, Turn

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "which digit is this ?"
ANSWER_LENGTH = 4
CAPTION_PROMPT = "describe the picture"
CAPTION_LENGTH = 20
HELD_OUT = 0.2

SCAN = 8  # side of a scan in pixels
PAD = 2  # empty pixels around a scan, for bicubic interpolation
SIDE = (40, 48, 56)  # smallest, held-out and largest side of an enlarged scan, of 64 pixels
TURN = 12.0  # largest rotation in degrees


def _load() -> tuple[np.ndarray, np.ndarray]:
    """All scans, uint8 [1797 8 8] in [0, 255], and their labels, int64 [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'Digits: the scans come with scikit-learn; install them with pip install "mmdlm[data]"'
        ) from error
    scans = load_digits()
    return np.round(scans.images * (255 / 16)).astype(np.uint8), scans.target.astype(np.int64)


def _is_held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Which scans are held out, bool [1797], with an equal share of every digit."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: round(HELD_OUT * len(members))]] = True
    return chosen


def _place(scan: np.ndarray, size: int, side: float, degrees: float, shift: tuple) -> np.ndarray:
    """Scales a scan to `side` pixels, rotates and shifts it: uint8 [Y X] with Y = X = `size`."""
    step = SCAN / side  # scan pixels per image pixel
    cos, sin = step * math.cos(math.radians(degrees)), step * math.sin(math.radians(degrees))
    middle = SCAN / 2 + PAD
    x, y = size / 2 + shift[0], size / 2 + shift[1]
    # Pillow maps output coordinates to source coordinates.
    matrix = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    source = Image.fromarray(np.pad(scan, PAD))
    return np.asarray(
        source.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    )


class Digits(Dataset):
    """Handwritten digits on a dark background, each with a question and a caption.

    Training scans are randomly shifted, scaled, rotated and tinted; held-out scans are centred,
    white and deterministic. The two splits are disjoint only with the same seed.

    Args:
        split: "train" (80 % of every digit) or "held_out" (the other 20 %).
        size: side of the images in pixels, at least 32.
        seed: seed of the split.
        cells: cells per side that samples have names for (see `mmdlm.data.naming`); 0 for none.
    """

    def __init__(
        self,
        split: Literal["train", "held_out"] = "train",
        size: int = 64,
        seed: int = 0,
        cells: int = 0,
    ) -> None:
        if split not in ("train", "held_out"):
            raise ValueError(f"Digits: split is {split!r}, expected 'train' or 'held_out'")
        if size < 32:
            raise ValueError(f"Digits: size is {size} px, expected at least 32")
        if seed < 0:
            raise ValueError(f"Digits: seed is {seed}, expected 0 or more")
        scans, labels = _load()
        chosen = _is_held_out(labels, seed) == (split == "held_out")
        self.split, self.size, self.cells = split, size, cells
        self.scans, self.labels = scans[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        """The digit at `index`; `rng` is used only for the augmentation of the training split.

        Raises:
            IndexError: the index is outside [0, length).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Digits: index {index} is outside [0, {len(self)})")
        word = WORDS[self.labels[index]]
        turns = (
            Turn(QUESTION, word, ANSWER_LENGTH),
            Turn(CAPTION_PROMPT, f"the handwritten digit {word}", CAPTION_LENGTH),
        )
        show = self._augmented if self.split == "train" else self._plain
        names = ((word,),) * self.cells**2 if self.cells else None
        image = show(self.scans[index], rng)
        return example(turns, group="digit", names=names, image=image)

    def _plain(self, scan: np.ndarray, _: np.random.Generator) -> np.ndarray:
        share = _place(scan, self.size, SIDE[1] * self.size / 64, 0.0, (0.0, 0.0))
        return _ink(share, np.full(3, 24.0), np.full(3, 240.0))

    def _augmented(self, scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        side, degrees = rng.uniform(SIDE[0], SIDE[2]), rng.uniform(-TURN, TURN)
        room = (64 - side) / 2
        shift = rng.uniform(-room, room, size=2) * self.size / 64
        share = _place(scan, self.size, side * self.size / 64, degrees, tuple(shift))
        ground = rng.uniform(8, 40, size=3)
        ink = rng.uniform(170, 255) * rng.uniform(0.85, 1.0, size=3)
        noise = rng.integers(0, 14, (self.size, self.size, 3), dtype=np.uint8)
        return _ink(share, ground, ink, noise)

    def vocabulary(self) -> list[str]:
        """Every word of prompts and answers, sorted."""
        texts = (*WORDS, QUESTION, CAPTION_PROMPT, "the handwritten digit")
        return sorted(set(" ".join(texts).split()))


def _ink(
    share: np.ndarray, ground: np.ndarray, ink: np.ndarray, noise: np.ndarray | None = None
) -> np.ndarray:
    """Blends ink and background: uint8 [Y X 3]; `share` uint8 [Y X], colours in [0, 255]."""
    weight = share[..., None] * np.float32(1 / 255)  # [Y X 1]
    image = weight * (ink - ground).astype(np.float32) + ground.astype(np.float32)
    if noise is not None:
        image += noise
    return np.minimum(image + 0.5, 255, out=image).astype(np.uint8)
