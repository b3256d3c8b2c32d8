"""Schedules grow with t, and their slopes are derivatives."""

from typing import get_args, get_type_hints

import pytest
import torch

from mmdlm.objectives.schedule import Schedule

KINDS = get_args(get_type_hints(Schedule)["kind"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.1, 0.7)])
def test_slope_is_the_derivative(kind, ends):
    schedule = Schedule(kind, *ends, power=1.5)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    p, slope = schedule(t)
    (gradient,) = torch.autograd.grad(p.sum(), t)
    torch.testing.assert_close(slope, gradient)
    torch.testing.assert_close(schedule.weight(t), gradient / p)
    assert (p.diff() > 0).all()
    assert ends[0] <= p.min() < p.max() <= ends[1]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "geometric"])
def test_nothing_is_masked_at_0_and_all_at_1(kind):
    p, _ = Schedule(kind)(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert p.tolist() == pytest.approx([0, 1], abs=1e-3)


def test_low_must_be_below_high():
    with pytest.raises(ValueError, match=r"low is 0\.5 and high 0\.2, expected low below high"):
        Schedule(low=0.5, high=0.2)
