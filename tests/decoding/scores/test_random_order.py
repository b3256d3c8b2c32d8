from collections.abc import Callable

import torch

from mmdlm.decoding.decode import decode
from mmdlm.decoding.scores.random_order import RandomOrder
from mmdlm.decoding.state import Streams


def test_every_order_comes_up_about_as_often(toy) -> None:
    prompt = torch.tensor([[3, 4]]).expand(600, -1)
    generator = torch.Generator().manual_seed(0)
    steps = decode(toy(), prompt, 3, [RandomOrder()], generator=generator).history.step
    orders, counts = steps.unique(dim=0, return_counts=True)
    assert len(orders) == 6
    # Binomial, 600 draws of 1/6: standard deviation 9.1.
    assert counts.min() > 60
    assert counts.max() < 140


def draws(seeds: Callable[..., list[torch.Generator]], *numbers: int) -> list[tuple[Streams, int]]:
    streams = Streams(seeds(*numbers), len(numbers), torch.device("cpu"))
    return [(streams, row) for row in range(len(numbers))]


def test_a_row_draws_the_same_alone_and_in_a_batch(moment, seeds) -> None:
    logits, masked = torch.zeros(2, 5, 4), torch.ones(2, 5).bool()
    masked[0, 2] = False
    both = moment(logits, masked)
    both._state.draws = draws(seeds, 1, 2)
    second = moment(logits[1:], masked[1:])
    second._state.draws = draws(seeds, 2)
    pairs = [(both.uniform(), second.uniform()) for _ in range(3)]
    for pair, alone in pairs:
        assert pair[1].equal(alone[0])
        assert pair[0, 2] == 0.5
    assert not pairs[0][0].equal(pairs[1][0])
