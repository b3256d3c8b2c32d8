"""Bootstrap intervals of corpus metrics, and of the difference of two models on the same rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ROUNDS = 1000
SHARE = 95  # of the resamples inside an interval, in per cent


def resampled(
    sums: np.ndarray,
    value: Callable[[np.ndarray], float],
    rows: np.ndarray,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> np.ndarray:
    """[rounds] values of resampled sets of rows; equal rows and seeds give the same resamples.

    Whole rows are drawn with replacement, as answers about one image are not independent.

    Args:
        sums: [n S], see `mmdlm.benchmarks.metrics.Scored`.
        value: see there.
        rows: [n] number of the row of each answer.
        rounds: number of resamples.
        seed: of the draws.
    """
    _, number = np.unique(rows, return_inverse=True)
    count = int(number.max()) + 1
    of_row = np.zeros((count, sums.shape[1]))
    np.add.at(of_row, number, sums)
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(rounds))
    return np.array([value(draw @ of_row) for draw in draws])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile interval of resampled values: (low, high)."""
    edge = (100 - SHARE) / 2
    low, high = np.percentile(values, [edge, 100 - edge])
    return float(low), float(high)
