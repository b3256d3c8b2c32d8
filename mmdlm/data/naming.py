"""Dense labels of synthetic scenes: the words that each image token shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

SHARE = 0.06  # smallest covered share of a cell for which it has names


class Disc(Protocol):
    """A shape as far as its labels need it, such as `mmdlm.data.scenes.Shape`."""

    x: float
    y: float
    radius: float
    size: str
    colour: str
    kind: str


def cell_words(shapes: Sequence[Disc], cells: int, grid: int) -> tuple[tuple[str, ...], ...]:
    """Size, colour and kind of the shape that covers most of each cell, row-major; () if empty.

    Args:
        shapes: of the scene.
        cells: cells per side.
        grid: side of the image in pixels of the scene's coordinates.
    Raises:
        ValueError: the cells do not divide the grid.
    """
    if cells < 1 or grid % cells:
        raise ValueError(f"cells is {cells}, expected a divisor of {grid}, the image's side")
    at = np.arange(grid) + 0.5
    covered = np.stack(
        [
            (at[None] - shape.x) ** 2 + (at[:, None] - shape.y) ** 2 <= shape.radius**2
            for shape in shapes
        ]
    )  # [shapes Y X], a disc around each shape
    side = grid // cells
    counts = covered.reshape(len(covered), cells, side, cells, side).mean((2, 4))
    best = counts.argmax(0).flatten()
    enough = counts.max(0).flatten() >= SHARE
    named = [(s.size, s.colour, s.kind) for s in shapes]
    return tuple(named[i] if ok else () for i, ok in zip(best, enough, strict=True))
