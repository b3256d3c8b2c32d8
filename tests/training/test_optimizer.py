"""AdamW and its schedule."""

import pytest
import torch

from mmdlm.training.optimizer import AdamW, Schedule

KINDS = ("cosine", "linear", "constant")


def step(settings):
    """A weight after one step with gradient 1."""
    weight = torch.nn.Parameter(torch.full((2, 2), 3.0))
    optimizer = settings.build([{"params": [weight], "weight_decay": settings.weight_decay}])
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize("fused", [None, True, False])
def test_a_step_equals_the_formula(fused):
    weight, optimizer = step(AdamW(lr=0.1, weight_decay=0.5, fused=fused))
    # Decay first; the first step of Adam is the sign of the gradient.
    torch.testing.assert_close(weight, torch.full((2, 2), 3 * (1 - 0.05) - 0.1))
    assert optimizer.param_groups[0]["fused"] is (fused is not False)


def test_devices_without_a_fused_kernel_get_the_plain_optimizer():
    weight = torch.nn.Parameter(torch.zeros(2, 2, device="meta"))
    assert AdamW().build([{"params": [weight]}]).param_groups[0]["fused"] is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"AdamW\.lr is 0\.0"),
        ({"weight_decay": -0.1}, r"AdamW\.weight_decay is -0\.1"),
        ({"betas": (0.9, 1.0)}, r"AdamW\.betas is \(0\.9, 1\.0\)"),
    ],
)
def test_optimizer_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        AdamW(**settings)


def test_schedule_without_warmup_starts_at_the_peak_and_ends_at_its_final_rate():
    schedule = Schedule(warmup=0, decay=1.0, final=0.2)
    assert schedule.factor(0, 0.0) == 1.0
    assert schedule.factor(5, 0.5) == pytest.approx(0.6)
    assert schedule.factor(10, 1.0) == pytest.approx(0.2)
    assert schedule.factor(1000, 100.0) == pytest.approx(0.2)
    assert schedule.factor(1000, 0.0) == 1.0  # a run of unknown length


def test_schedules_by_name():
    halfway = {kind: Schedule(kind, 0, 1.0, 0.0).factor(50, 0.75) for kind in KINDS}
    assert halfway == pytest.approx({"cosine": 0.146, "linear": 0.25, "constant": 1.0}, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": -1}, r"warmup is -1"),
        ({"decay": 1.5}, r"decay is 1\.5"),
        ({"final": -1}, "final"),
    ],
)
def test_schedule_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)
