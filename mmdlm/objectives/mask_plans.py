"""Which tokens of an answer to mask, and how to weight the losses, to bound its log likelihood.

For A tokens the bound is ELBO = -sum over k = 1..A of (1/k) mean of CE(S) over all S of k tokens,
where CE(S) is the summed cross entropy of the tokens in S, given the others. Every plan here is an
unbiased estimate of it: -sum of weight * CE over its masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, sqrt

import numpy as np
import torch
from torch import Tensor

MOST_EXACT = 16
"""Longest answer whose masks can all be listed: 65,535 of them."""
NODES = 3
"""Gauss-Legendre nodes of `quadrature`; the integrand is a polynomial in t and nearly linear."""


@dataclass(frozen=True)
class Plan:
    """Masks with weights.

    Args:
        masks: [N A] bool, True = masked.
        weights: [N] float64.
        unit: [N] int64, masks that were drawn together have one number.
        cell: [N] int64, units that are independent draws of the same quantity have one number; -1
            for masks that were not drawn, which have no sampling error.
    """

    masks: Tensor
    weights: Tensor
    unit: Tensor
    cell: Tensor

    def estimate(self, losses: Tensor) -> tuple[float, float | None]:
        """The bound in nats, and its standard error; None if a cell has one unit only.

        Args:
            losses: [N] summed cross entropy of the masked tokens of each mask.
        """
        values = -self.weights * losses.double().cpu()
        variance: float | None = 0.0
        for cell in self.cell.unique().tolist():
            inside = self.cell == cell
            _, unit = self.unit[inside].unique(return_inverse=True)
            count = int(unit.max()) + 1
            sums = torch.zeros(count, dtype=torch.float64).index_add_(0, unit, values[inside])
            if cell < 0:
                continue
            if count == 1 or variance is None:
                variance = None
            else:
                variance += count * float(sums.var())
        return float(values.sum()), None if variance is None else sqrt(variance)


def exact(length: int) -> Plan:
    """All masks of an answer.

    Args:
        length: A, at most `MOST_EXACT` tokens.

    Raises:
        ValueError: the answer is longer.
    """
    if length > MOST_EXACT:
        raise ValueError(
            f"exact enumeration of {length} tokens needs 2^{length} forwards, expected at most "
            f"{MOST_EXACT} tokens; use the method 'stratified'"
        )
    bits = torch.arange(1, 2**length)[:, None] >> torch.arange(length)
    masks = (bits & 1).bool()
    weights = [1 / (k * comb(length, k)) for k in masks.sum(1).tolist()]
    number = torch.arange(len(masks))
    return Plan(masks, torch.tensor(weights, dtype=torch.float64), number, 0 * number - 1)


def monte_carlo(length: int, samples: int, generator: torch.Generator, group: int = 16) -> Plan:
    """LLaDA's estimator: groups of masks whose sizes are spread evenly from a random start.

    Source: ML-GSAI/LLaDA, get_log_likelihood.py (mc_num is `samples`, batch_size is `group`).

    Args:
        length: A.
        samples: number of masks; one is enough for a single token.
        generator: of the sizes and masks.
        group: masks per group.

    Raises:
        ValueError: `samples` is not a multiple of `group`.
    """
    if samples % group:
        raise ValueError(f"samples is {samples}, expected a multiple of group, which is {group}")
    starts = torch.randint(1, length + 1, (samples // group,), generator=generator).tolist()
    sizes = torch.cat([mask_sizes(start, group, length) for start in starts])
    unit = torch.arange(samples) // group
    return Plan(
        subsets(sizes, length, generator), length / sizes.double() / samples, unit, 0 * unit
    )


def mask_sizes(start: int, group: int, length: int) -> Tensor:
    """Sizes [group] of LLaDA's masks: evenly spaced from `start`, rounded half to even, modulo A.

    Args:
        start: size of the first, 1 to A.
        group: number of sizes.
        length: A.
    """
    even = torch.linspace(start, start + (group - 1) * (length / group), group)
    return (even.round().long() - 1) % length + 1


def stratified(length: int, samples: int, generator: torch.Generator) -> Plan:
    """One mask from each of equal strata of sizes, so that every size is drawn equally often.

    Args:
        length: A.
        samples: number of masks and strata.
        generator: of the sizes and masks.
    """
    sizes = _strata(length, samples, generator)
    number = torch.arange(samples)
    weights = length / sizes.double() / samples
    return Plan(subsets(sizes, length, generator), weights, number, _neighbours(samples))


def complementary(length: int, samples: int, generator: torch.Generator) -> Plan:
    """The full mask, and stratified pairs of a mask and its complement.

    A pair scores every token once, so the choice of tokens adds less variance.

    Args:
        length: A.
        samples: number of masks; the pairs are at least 1 and at most half as many.
        generator: of the sizes and masks.
    """
    full = torch.ones(1, length, dtype=torch.bool)
    weight = torch.tensor([1 / length], dtype=torch.float64)
    none = torch.full((1,), -1)
    if length == 1:
        return Plan(full, weight, none, none)
    pairs = max(1, (samples - 1) // 2)
    sizes = _strata(length - 1, pairs, generator)
    half = subsets(sizes, length, generator)
    both = torch.cat([sizes, length - sizes]).double()
    unit, cell = torch.arange(pairs), _neighbours(pairs)
    return Plan(
        torch.cat([full, half, ~half]),
        torch.cat([weight, (length - 1) / (2 * pairs * both)]),
        torch.cat([none, unit, unit]),
        torch.cat([none, cell, cell]),
    )


def quadrature(length: int, samples: int, generator: torch.Generator, nodes: int = NODES) -> Plan:
    """Gauss-Legendre quadrature over the mask probability t, with independent masks per node.

    Args:
        length: A.
        samples: number of masks, rounded down to a multiple of `nodes` (at least one each).
        generator: of the masks.
        nodes: number of nodes.
    """
    draws = max(1, samples // nodes)
    t, weight = (each.repeat_interleave(draws) for each in gauss_legendre(nodes))
    masks = torch.rand(len(t), length, generator=generator, dtype=torch.float64) < t[:, None]
    number = torch.arange(len(t))
    return Plan(masks, weight / t / draws, number, number // draws)


def gauss_legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [nodes] float64 of Gauss-Legendre quadrature on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy(x / 2 + 0.5), torch.from_numpy(w / 2)


def subsets(sizes: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """[N A] bool, uniform random subsets of the given sizes [N]."""
    noise = torch.rand(len(sizes), length, generator=generator, dtype=torch.float64)
    return noise.argsort(1).argsort(1) < sizes[:, None]


def _strata(length: int, samples: int, generator: torch.Generator) -> Tensor:
    """Sizes [samples] from 1 to `length`, one from each of equal strata, ascending."""
    noise = torch.rand(samples, generator=generator, dtype=torch.float64)
    t = (torch.arange(samples) + noise) / samples
    return (t * length).long().clamp(max=length - 1) + 1


def _neighbours(count: int) -> Tensor:
    """Cell of each stratum: pairs of neighbours, whose difference bounds their variance."""
    return (torch.arange(count) // 2).clamp(max=max(0, count // 2 - 1))
