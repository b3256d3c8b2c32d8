"""Mean training losses equal the enumerated bound of the log likelihood."""

import pytest
import torch

from mmdlm.objectives.block_diffusion import BlockDiffusion
from mmdlm.objectives.complementary import Complementary
from mmdlm.objectives.draw import GOLDEN, Draw
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.objective import Batch
from mmdlm.objectives.schedule import Schedule
from mmdlm.tasks.likelihood import likelihood
from tests.objectives.test_masked import row, small

ANSWER = [3, 5, 4, 3]
N = 150


def exact(model):
    """The enumerated bound; block by block for a model with blocks."""
    return likelihood(model, torch.tensor([4]), torch.tensor(ANSWER), method="exact")


def mean_loss(model, objective):
    """Average over draws of the summed loss of one answer, and its standard error."""
    means = []
    for start in range(0, 16 * N, N):
        seeds = torch.arange(start, start + N)
        sequence = model.arrange([row([4], ANSWER)] * N)
        with torch.no_grad():
            losses = objective.step(model, Batch(sequence, seeds, (seeds / GOLDEN).double() % 1))
        means.append(losses.mean() * len(ANSWER))
    means = torch.stack(means)
    return means.mean().item(), means.std().item() / 4


BOUNDS = [
    Masked(),
    Masked(draw=Draw(count="exact"), eps=0.0),
    Masked(draw=Draw(spread="stratified", per="row")),
    *(
        Masked("schedule", schedule=Schedule(kind))
        for kind in ("linear", "cosine", "mdlm_cosine", "cosine_squared", "logarithmic")
    ),
    Complementary(Masked()),
    Complementary(Masked("schedule", schedule=Schedule("cosine_squared"))),
    # The mean over rows of the loss per token.
    Masked(normaliser="row"),
]


@pytest.mark.parametrize("objective", BOUNDS, ids=range(len(BOUNDS)))
def test_mean_training_loss_is_the_exact_bound(objective):
    model = small(vocab=6).eval()
    want = -exact(model)
    mean, error = mean_loss(model, objective)
    assert mean == pytest.approx(want, abs=4 * error)
    assert error < 0.06 * want


@pytest.mark.parametrize("per", ["turn", "block"])
def test_mean_block_loss_is_the_sum_of_the_blocks_bounds(per):
    model = small("block_causal", 2, vocab=6).eval()
    want = -exact(model)
    objective = BlockDiffusion(Masked(draw=Draw(per=per)))
    mean, error = mean_loss(model, objective)
    assert mean == pytest.approx(want, abs=4 * error)
    assert error < 0.06 * want


def test_logged_bound_does_not_depend_on_the_weights():
    model = small(vocab=6).eval()
    n = 2000
    seeds = torch.arange(n)
    batch = Batch(model.arrange([row([4], ANSWER)] * n), seeds, seeds.double() / n)
    with torch.no_grad():
        logs = Masked("one", "masked").step(model, batch).logs
    total, count = logs["nll"]
    want = -exact(model) / len(ANSWER)
    assert (total / count).item() == pytest.approx(want, rel=0.06)
    bins = [logs[f"ce_p0.{i}"] for i in range(10)]
    torch.testing.assert_close(sum(a for a, _ in bins), logs["ce"][0], rtol=1e-4, atol=0)
    assert sum(b for _, b in bins) == logs["ce"][1]
    means = [(a / b).item() for a, b in bins]
    # More masks leave less to predict from: these means differ far less than single losses.
    assert max(means) - min(means) < 1.5
    assert "nll" not in Masked(full=0.5).step(model, batch).logs
