"""Average neighbouring tokens of the grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from adapters.pruner import Pruned, Pruner, Seen


@dataclass(frozen=True)
class Pooling(Pruner):
    """Averages areas of the grid of tokens, so that about `keep` of them remain.

    Tokens without a grid (views with newline vectors, audio) are averaged along the sequence.
    """

    def merge(self, seen: Seen, count: int) -> Pruned:
        """See `Pruner.merge`; an average is at the place in the middle of its area."""
        tokens, device = seen.tokens.float(), seen.tokens.device
        size, grid = (1, count), (1, len(tokens))
        if seen.grid is not None:
            size, grid = smaller(seen.grid, count), seen.grid
        image = tokens.unflatten(0, grid).permute(2, 0, 1)  # [D Y X]
        pooled = functional.adaptive_avg_pool2d(image, size).flatten(1).T
        rows, columns = (
            ((torch.arange(few, device=device) + 0.5) * (many / few)).long()
            for few, many in zip(size, grid, strict=True)
        )
        places = (rows[:, None] * grid[1] + columns).flatten()
        return Pruned(pooled.to(seen.tokens.dtype), places)


def smaller(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows and columns of about the same proportion that make up at most `count` tokens."""
    scale = math.sqrt(count / (grid[0] * grid[1]))
    rows = max(1, min(grid[0], round(grid[0] * scale), count))
    return rows, max(1, min(grid[1], count // rows))
