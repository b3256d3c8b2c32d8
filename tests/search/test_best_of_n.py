"""Best of n: the most confident decode, or the one with the highest custom score."""

import math

import pytest
import torch

from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.decoding.scores.random_order import RandomOrder
from mmdlm.search.best_of_n import best_of_n, mean_log_probability

LENGTH, ENDS = 10, {1, 3}


def surety(tokens: list[int], steps: list[int], sure: list[float]) -> float:
    """Slow reference: mean log probability of generated tokens up to the end token."""
    logs = []
    for token, step, probability in zip(tokens, steps, sure, strict=True):
        if step >= 0:
            logs.append(math.log(probability))
        if token in ENDS:
            break
    return sum(logs) / len(logs) if logs else 0.0


def test_most_confident_decode_wins_in_every_row(toy, batch) -> None:
    tokens, mask = batch(7, 4, 6)
    canvas = torch.full((3, LENGTH), 2)
    canvas[1, 0] = 17
    strategies = [Threshold(0.4)]
    got, all_ = best_of_n(toy, tokens, LENGTH, strategies, n=5, mask=mask, canvas=canvas)
    decodes = []
    for seed in range(5):
        generators = [torch.Generator().manual_seed(seed) for _ in range(3)]
        sampled = [Gumbel(0.9), *strategies]
        decodes.append(
            decode(toy, tokens, LENGTH, sampled, mask=mask, generator=generators, canvas=canvas)
        )
    for row in range(3):
        by_hand = [
            surety(
                d.tokens[row, -LENGTH:].tolist(),
                d.history.step[row].tolist(),
                d.history.confidence[row].tolist(),
            )
            for d in decodes
        ]
        assert all_.scores[row] == pytest.approx(by_hand)
        best = by_hand.index(max(by_hand))
        assert all_.winner[row] == best
        assert got.tokens[row].equal(decodes[best].tokens[row])
        assert got.history.confidence[row].equal(decodes[best].history.confidence[row])
    assert len(set(all_.winner)) > 1
    assert got.nfe == all_.nfe == sum(d.nfe for d in decodes)


def test_custom_score_selects_the_winner(toy, batch) -> None:
    tokens, mask = batch(7, 4)
    seen = []

    def most_of_ten(ids: list[int]) -> float:
        seen.append(ids)
        assert not ENDS & set(ids)
        return sum(abs(i - 10) for i in ids)

    _, all_ = best_of_n(toy, tokens, LENGTH, n=4, mask=mask, score=most_of_ten)
    assert len(seen) == 8
    for row, winner in enumerate(all_.winner):
        assert all_.scores[row][winner] == max(all_.scores[row])


def test_ties_go_to_the_first_candidate(toy, batch) -> None:
    tokens, mask = batch(7, 4)
    _, all_ = best_of_n(toy, tokens, LENGTH, seeds=(9, 8, 7), mask=mask, score=lambda ids: 1)
    assert all_.winner == (0, 0)
    assert all_.seeds == (9, 8, 7)


def test_strategies_that_sample_themselves(toy, batch) -> None:
    tokens, mask = batch(7, 4)
    got, all_ = best_of_n(toy, tokens, LENGTH, [RandomOrder()], n=3, temperature=0, mask=mask)
    assert len({tuple(c.tokens.flatten().tolist()) for c in all_.candidates}) > 1
    assert mean_log_probability(toy, got) == pytest.approx([max(row) for row in all_.scores])


def test_one_decode_without_temperature_equals_a_plain_one(toy, batch) -> None:
    tokens, mask = batch(7, 4)
    got, _ = best_of_n(toy, tokens, LENGTH, n=1, temperature=0, mask=mask)
    assert got.tokens.equal(decode(toy, tokens, LENGTH, mask=mask).tokens)


def test_batch_row_equals_single_row(toy, batch) -> None:
    sizes = (7, 4, 6)
    tokens, mask = batch(*sizes)
    got, all_ = best_of_n(toy, tokens, LENGTH, n=3, mask=mask)
    for row, size in enumerate(sizes):
        alone, single = best_of_n(toy, tokens[row : row + 1, -size:], LENGTH, n=3)
        assert got.tokens[row, -LENGTH:].equal(alone.tokens[0, -LENGTH:])
        assert all_.winner[row] == single.winner[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "expected at least one decode"),
        ({"seeds": ()}, "expected at least one decode"),
        ({"score": lambda ids: math.nan}, "a score is NaN"),
        ({"strategies": [Gumbel()]}, "both decide 'pick'"),
    ],
)
def test_invalid_arguments_of_best_of_n_are_rejected(toy, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_of_n(toy, torch.tensor([[5]]), 2, **given)
