"""All sums and counts of a step are added up over processes by one call."""

from types import SimpleNamespace

import pytest
import torch

from mmdlm.objectives.objective import Losses
from mmdlm.training.module import Module
from mmdlm.training.reduction import Totals, totals


def scalar(value):
    return torch.tensor(float(value))


def losses_of(scale):
    """Two data sets: one with an extra loss, one that counts nothing in one metric."""
    weight = torch.tensor(2.0 * scale, requires_grad=True)
    first = Losses(
        weight * 3,
        scalar(4 * scale),
        {"ce": (weight * 3, scalar(4)), "naming": (scalar(5), scalar(10))},
        ((weight * 5, torch.tensor(10), 0.3),),
    )
    second = Losses(
        weight * 7, scalar(2), {"ce": (weight * 7, scalar(2)), "rare": (scalar(0),) * 2}
    )
    return {"scenes": first, "speech": second}


def test_one_process_averages_its_own_sums():
    losses = losses_of(1)
    found = totals(losses, torch.device("cpu"), lambda values: values)
    for name, each in losses.items():
        assert found.mean(name, each) == each.mean()
    means = {name: float(value) for name, value in found.means().items()}
    assert means == pytest.approx(
        {"scenes/ce": 6 / 4, "scenes/naming": 0.5, "speech/ce": 7.0}, rel=1e-6
    )


class Logged(Module):
    """A module of given losses in two processes, the other one with other losses."""

    def __init__(self, mine, other, log_every=1):
        super(Module, self).__init__()
        self.weights = {"speech": 0.5}
        self.mine, self.other = mine, other
        self.calls, self.logged = [], {}
        self._trainer = SimpleNamespace(
            world_size=2, should_stop=False, global_step=0, log_every_n_steps=log_every
        )

    def losses(self, part):
        return part

    def all_gather(self, values):
        self.calls.append(values.shape)
        other = []
        for each in self.other.values():
            logs = {"loss": (each.sum, each.count), **each.logs}
            other += [*each.counts, *(value for pair in logs.values() for value in pair)]
        return torch.stack([values, torch.tensor([float(value.detach()) for value in other])])

    def log(self, name, value, **settings):
        self.logged[name] = (float(value), settings["prog_bar"])


def test_a_step_over_two_data_sets_makes_one_collective_call():
    mine, other = losses_of(1), losses_of(2)
    module = Logged(mine, other)
    loss = module.training_step(mine, 0)
    assert len(module.calls) == 1
    scenes = 6 / 12 + 0.3 * 10 / 20
    speech = 14 / 4
    # Times two: the gradient is averaged over two processes afterwards.
    assert loss.item() == pytest.approx(2 * (scenes + 0.5 * speech) / 1.5)
    loss.backward()
    want = {
        "train/scenes/loss": (18 / 12, False),
        "train/scenes/ce": (18 / 8, True),
        "train/scenes/naming": (0.5, False),
        "train/speech/loss": (42 / 4, False),
        "train/speech/ce": (42 / 4, True),
    }
    assert module.logged.keys() == want.keys()
    for name, (value, shown) in want.items():
        assert module.logged[name] == (pytest.approx(value), shown)


def test_the_host_reads_metrics_at_logging_steps_only(monkeypatch):
    mine = losses_of(1)
    module = Logged(mine, losses_of(2), log_every=3)
    reads = []
    means = Totals.means
    monkeypatch.setattr(Totals, "means", lambda self: reads.append(1) or means(self))
    for step in range(6):
        module._trainer.global_step = step
        module.training_step(mine, step)
        assert len(reads) == (step + 1) // 3
    assert len(module.calls) == 6
    module._trainer.global_step, module._trainer.should_stop = 6, True
    module.training_step(mine, 6)
    assert len(reads) == 3


@pytest.mark.parametrize("part", ["validation", "test"])
def test_an_evaluation_step_makes_one_collective_call(part):
    mine = losses_of(1)
    module = Logged(mine, {})
    module.all_gather = lambda values: module.calls.append(1) or torch.stack([values, values])
    getattr(module, f"{part}_step")(mine, 0)
    assert len(module.calls) == 1
    prefix = {"validation": "val", "test": "test"}[part]
    assert set(module.logged) == {
        f"{prefix}/{n}" for n in ("scenes/ce", "scenes/naming", "speech/ce")
    }
    assert module.logged[f"{prefix}/scenes/ce"][0] == pytest.approx(6 / 4)
