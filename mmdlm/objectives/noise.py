"""Random numbers that depend only on the seed of a batch row, and the noise drawn from them.

A counter-based generator (the SplitMix64 finaliser, Steele et al. 2014): the number at position i
of a row is a hash of (seed, i). The masks of a training sample therefore do not depend on the rest
of the batch, the number of processes or a resume, and a checkpoint needs no generator state.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Which tokens of a batch are masked, and how probable that was.

    Args:
        masked: [B L] bool, tokens that the model has to predict.
        maskable: [B L] bool, tokens that could have been masked.
        real: [B L] bool, False at padding; these positions count in Z = batch x length.
        p: [B L] float32 mask probability.
        slope: [B L] float32, dp/dt of the schedule at the level that was drawn.
        covered: [B L] bool, tokens that are masked in the input but not predicted; None if all
            masked tokens are predicted.
        row: [B L] int64, conversation of each token of a packed batch, the highest number at
            padding; None where every batch row is one, see `mmdlm.objectives.packing`.
    """

    masked: Tensor
    maskable: Tensor
    real: Tensor
    p: Tensor
    slope: Tensor
    covered: Tensor | None = None
    row: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """[B L] bool, tokens that are masked in the input."""
        return self.masked if self.covered is None else self.masked | self.covered

    def complement(self) -> Noise:
        """The noise that masks the other maskable tokens, each with probability 1 - p.

        The levels were drawn for p, so the slope stays, and slope / (1 - p) is the weight of the
        bound for the complement.
        """
        return replace(self, masked=self.maskable & ~self.masked, p=1 - self.p)

    def joined(self, other: Noise) -> Noise:
        """The noise of two batches of equal length, one after the other."""
        values = {
            f.name: torch.cat([getattr(self, f.name), getattr(other, f.name)])
            for f in fields(self)
            if getattr(self, f.name) is not None
        }
        if self.row is not None:
            values["row"] = torch.cat([self.row, other.row + self.row.max() + 1])
        return replace(self, **values)

    def per_row(self, values: Tensor) -> Tensor:
        """[N] sums over each conversation of values [B L]."""
        if self.row is None:
            return values.sum(1)
        sums = values.new_zeros(int(self.row.max()) + 1)
        return sums.index_add(0, self.row.flatten(), values.flatten())


def uniform(seeds: Tensor, count: int, stream: int = 0) -> Tensor:
    """[B count] float64 in [0, 1).

    Args:
        seeds: [B] int64, one per row.
        count: numbers per row.
        stream: numbers of different streams are independent.
    """
    return uniform_at(seeds, torch.arange(count, device=seeds.device)[None], stream)


def uniform_at(seeds: Tensor, at: Tensor, stream: int = 0) -> Tensor:
    """[B N] float64 in [0, 1), the numbers of `uniform` at chosen indices.

    Args:
        seeds: [B] int64, one per row.
        at: [B N] or [1 N] int64, indices of a row's numbers; equal indices have equal numbers.
        stream: numbers of different streams are independent.
    """
    mixed = _mix(_mix(seeds)[:, None] + _mix(at + (stream << 32)))
    return (mixed >> 11 & (1 << 53) - 1).double() * 2.0**-53


def stratified(draws: Tensor) -> Tensor:
    """[n] one number in each of n equal parts of [0, 1): (u_i + i) / n mod 1.

    Source: kuleshov-group/mdlm: diffusion.py, antithetic sampling.

    Args:
        draws: [n] uniform in [0, 1).
    """
    n = len(draws)
    return (draws + torch.arange(n, device=draws.device)) / n % 1


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 on int64, wrapping; the right shifts are logical."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ (x >> 31 & (1 << 33) - 1)
