"""Random numbers that depend only on the seed of a batch row.

A counter-based generator (the SplitMix64 finaliser, Steele et al. 2014): the number at position i
of a row is a hash of (seed, i). The masks of a training sample therefore do not depend on the rest
of the batch, the number of processes or a resume, and a checkpoint needs no generator state.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(seeds: Tensor, count: int, stream: int = 0) -> Tensor:
    """[B count] float64 in [0, 1).

    Args:
        seeds: [B] int64, one per row.
        count: numbers per row.
        stream: numbers of different streams are independent.
    """
    at = torch.arange(count, device=seeds.device) + (stream << 32)
    mixed = _mix(_mix(seeds)[:, None] + _mix(at)[None])
    return (mixed >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 on int64, wrapping; the right shifts are logical."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ (x >> 31 & (1 << 33) - 1)
