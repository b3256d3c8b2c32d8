"""Certainty forcing: which tokens are masked, and a slow form of the loss."""

import torch

from mmdlm.layout import Row, Turn
from mmdlm.objectives.dparallel import DParallel
from mmdlm.objectives.objective import Batch
from tests.objectives.test_masked import row, small


def test_one_block_is_masked_and_all_after_it_is_covered():
    model = small()
    n = 600
    rows = [row([3, 4], [5, 6, 7, 8, 9, 10, 11, 5, 6, 7])] * n  # blocks of 4, 4 and 2
    batch = Batch(model.arrange(rows), torch.arange(n), torch.zeros(n).double())
    noise = DParallel(block_size=4).corrupt(batch)
    sizes = noise.maskable.sum(1)
    assert set(sizes.tolist()) == {4, 2}
    assert (sizes == 2).float().mean().item() - 1 / 3 < 0.06
    first = noise.maskable.long().argmax(1)
    assert set(first.tolist()) == {2, 6, 10}
    after = torch.arange(12) >= (first + sizes)[:, None]
    assert torch.equal(noise.covered, after)
    assert abs(noise.masked.sum() / noise.maskable.sum() - 0.5) < 0.03


def test_each_turn_has_its_own_block():
    model = small("cascade")
    turn = Turn(torch.tensor([7]), torch.tensor([8, 3, 5, 4]))
    rows = [Row((torch.randn(4, 16),), (turn, turn))] * 50
    batch = Batch(model.arrange(rows), torch.arange(50), torch.zeros(50).double())
    noise = DParallel(block_size=2).corrupt(batch)
    both = noise.maskable[:, torch.tensor([5, 7, 10, 12])]
    assert (both[:, 0] ^ both[:, 1]).all()
    assert (both[:, 2] ^ both[:, 3]).all()
    assert (both[:, 0] != both[:, 2]).any()


def test_certain_right_answers_cost_little():
    """Only the entropy of right predictions counts."""
    objective = DParallel()
    sharp, flat = torch.tensor([[9.0, 0, 0]]), torch.tensor([[0.2, 0, 0]])
    for logits, right in ((sharp, 1), (flat, 1)):
        losses, entropy, hit = objective.measure(logits, torch.tensor([0]))
        p = (logits / 0.5).softmax(-1)
        torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))
        assert hit.item() == right
        assert losses.item() > 0
    assert objective.measure(sharp, torch.tensor([1]))[2].item() == 0
