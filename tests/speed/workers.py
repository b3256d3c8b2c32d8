"""Samples per second of two data workers over none, in processor seconds."""

from __future__ import annotations

import os
from multiprocessing import get_context
from statistics import median

from torch.utils.data import DataLoader, Dataset

from mmdlm.training.data import unchanged

FEW, MANY = 6, 30
"""Batches of a short and a long run, whose difference has no start of processes in it."""


def speedup(steps: Dataset, workers: int = 2, rounds: int = 3) -> float:
    """Speed of preparing batches in workers over that in the training process, on idle cores.

    On as many idle cores as workers, all processor seconds are shared by these, so the ratio is
    workers x seconds without / seconds with workers. Wall time would depend on what else runs.

    Args:
        steps: batch of each step.
        workers: number of workers.
        rounds: alternating; the median of their ratios counts.
    """
    ratios = []
    for _ in range(rounds):
        alone, shared = _seconds(steps, 0), _seconds(steps, workers)
        ratios.append(workers * alone / shared)
    return median(ratios)


def _seconds(steps: Dataset, workers: int) -> float:
    """Processor seconds per batch of this process and the workers."""
    return (_total(steps, workers, MANY) - _total(steps, workers, FEW)) / (MANY - FEW)


def _total(steps: Dataset, workers: int, count: int) -> float:
    """Processor seconds of some batches."""
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(1, count + 1),
        num_workers=workers,
        collate_fn=unchanged,
        multiprocessing_context=get_context("fork") if workers else None,
    )
    before = os.times()
    batches = iter(loader)
    for _ in batches:
        pass
    del batches  # workers end, and their seconds are added to ours
    return sum(os.times()[:4]) - sum(before[:4])
