"""The two masks partition the answer, and media are encoded once."""

import torch

from mmdlm.layout import Row, Turn
from mmdlm.objectives.complementary import Complementary
from mmdlm.objectives.grounded import Grounded
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.objective import Batch
from tests.objectives.test_masked import small


def media_batch(model):
    turns = (
        Turn(torch.tensor([7]), torch.tensor([8, 3, 5, 1])),
        Turn(torch.tensor([9, 4]), torch.tensor([10, 4, 6])),
    )
    rows = [Row((torch.randn(4, 16),), turns), Row((torch.randn(2, 16),), turns[:1])]
    return Batch(model.arrange(rows), torch.tensor([4, 9]), torch.tensor([0.3, 0.8]).double())


def test_masks_partition_the_answer():
    model = small("cascade")
    batch, seen = media_batch(model), []
    hidden_at = model.hidden_at
    model.hidden_at = lambda sequence, at: seen.append((sequence, at)) or hidden_at(sequence, at)
    losses = Complementary().step(model, batch)
    ((sequence, at),) = seen
    first, second = at.chunk(2)
    assert first.any()
    assert second.any()
    assert not (first & second).any()
    assert torch.equal(first | second, batch.sequence.is_answer)
    assert torch.equal(sequence.tokens == model.spec.mask_id, at)
    assert losses.count == batch.sequence.is_answer.sum()


def test_equals_two_separate_forwards():
    model = small("cascade")
    batch = media_batch(model)
    for objective in (Masked("one", "masked"), Masked(), Masked("cart", "row")):
        noise = objective.corrupt(batch)
        first = objective.loss(model, batch, noise)
        second = objective.loss(model, batch, noise.complement())
        both = Complementary(objective).loss(model, batch, noise)
        torch.testing.assert_close(both.sum, first.sum + second.sum)
        assert both.count == first.count + second.count


def test_the_naming_loss_is_added():
    model = small("cascade")
    batch = media_batch(model)
    alone, grounded = Complementary(), Grounded(objective=Complementary())
    assert grounded.step(model, batch).sum.item() == alone.step(model, batch).sum.item()
