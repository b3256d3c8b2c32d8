"""Plans of masks are unbiased, state their standard error, and equal published values."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdlm.objectives.mask_plans import (
    MOST_EXACT,
    complementary,
    exact,
    gauss_legendre,
    mask_sizes,
    monte_carlo,
    quadrature,
    stratified,
)

LENGTH = 5
DRAWN = [monte_carlo, stratified, complementary, quadrature]


def cases(golden: Path) -> dict:
    return json.loads((golden / "objectives" / "likelihood.json").read_text())["cases"]


def loss_of(masks: Tensor) -> Tensor:
    """A cross entropy that is no function of the number of masks alone."""
    place = torch.arange(1, masks.shape[1] + 1).double()
    alone = (masks * place).sum(1)
    return alone + (masks[:, :1] & masks[:, -1:]).squeeze(1) * 3.0 + masks.sum(1).double() ** 1.5


def bound() -> float:
    """The bound by its formula, with plain loops."""
    total = 0.0
    for k in range(1, LENGTH + 1):
        rows = [
            [i in chosen for i in range(LENGTH)]
            for chosen in itertools.combinations(range(LENGTH), k)
        ]
        total -= loss_of(torch.tensor(rows)).mean().item() / k
    return total


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_enumeration_is_the_formula():
    plan = exact(LENGTH)
    value, error = plan.estimate(loss_of(plan.masks))
    assert value == pytest.approx(bound(), rel=1e-12)
    assert error == 0.0


@pytest.mark.parametrize("plan", DRAWN)
def test_estimates_agree_with_the_bound_within_their_standard_error(plan):
    found = [
        drawn.estimate(loss_of(drawn.masks))
        for drawn in (plan(LENGTH, 48, seeded(seed)) for seed in range(200))
    ]
    values = torch.tensor([value for value, _ in found])
    stated = math.sqrt(sum(error**2 for _, error in found) / len(found))
    assert abs(values.mean().item() - bound()) < 4 * stated / math.sqrt(len(found))
    assert values.std().item() < 1.3 * stated


@pytest.mark.parametrize("plan", [stratified, complementary])
def test_spread_out_masks_have_a_smaller_error_than_independent_groups(plan):
    def error(make):
        plans = [make(LENGTH, 48, seeded(seed)) for seed in range(100)]
        return torch.tensor([p.estimate(loss_of(p.masks))[0] for p in plans]).std()

    assert error(complementary) < error(monte_carlo)
    assert error(plan) <= 1.1 * error(monte_carlo)


def test_pairs_mask_every_token_once():
    plan = complementary(LENGTH, 21, seeded(0))
    pairs = plan.masks[1:].unflatten(0, (2, 10))
    assert plan.masks[0].all()
    assert bool((pairs[0] ^ pairs[1]).all())


@pytest.mark.parametrize("plan", DRAWN)
def test_a_single_token_needs_no_luck(plan):
    drawn = plan(1, 48, seeded(0))
    value, _ = drawn.estimate(2.5 * drawn.masks[:, 0])
    if plan is quadrature:  # independent masks may leave the token out
        assert value < 0
    else:
        assert value == pytest.approx(-2.5)


def test_one_group_has_no_standard_error():
    plan = monte_carlo(LENGTH, 16, seeded(0))
    assert plan.estimate(loss_of(plan.masks))[1] is None


def test_groups_must_divide_the_samples():
    with pytest.raises(ValueError, match="samples is 20, expected a multiple of group"):
        monte_carlo(LENGTH, 20, seeded(0))


def test_long_answers_are_not_enumerated():
    with pytest.raises(ValueError, match=f"at most {MOST_EXACT} tokens; use .* 'stratified'"):
        exact(MOST_EXACT + 1)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_mask_sizes_equal_published_ones(number, golden):
    case = cases(golden)[f"likelihood.mask_counts.{number}"]
    given = case["inputs"]
    sizes = mask_sizes(given["k"], given["batch"], given["answer_len"])
    assert sizes.tolist() == case["outputs"]["count"]["data"]
    share = (sizes / given["answer_len"]).tolist()
    assert share == pytest.approx(case["outputs"]["p_mask"]["data"], rel=1e-6)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 8])
def test_nodes_equal_recorded_ones(nodes, golden):
    want = cases(golden)[f"likelihood.gauss_legendre.n{nodes}"]["outputs"]
    t, weights = gauss_legendre(nodes)
    assert t.tolist() == pytest.approx(want["t"]["data"], rel=1e-12)
    assert weights.tolist() == pytest.approx(want["w"]["data"], rel=1e-12)


def test_masks_are_those_of_llada():
    plan = monte_carlo(6, 32, seeded(3), group=4)
    groups = plan.masks.sum(1).unflatten(0, (8, 4)).tolist()
    known = [mask_sizes(start, 4, 6).tolist() for start in range(1, 7)]
    assert all(sizes in known for sizes in groups)
    assert plan.weights.tolist() == pytest.approx(
        [6 / size / 32 for sizes in groups for size in sizes]
    )
