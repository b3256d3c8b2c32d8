"""HEX: majority vote over decodes."""

from collections import Counter

import pytest
import torch

from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.search.hex_vote import hex_vote

LENGTH, ENDS = 12, {1, 3}


def answer(tokens: list[int]) -> tuple[int, ...]:
    """Slow reference: tokens before the end token."""
    answers = []
    for token in tokens:
        if token in ENDS:
            break
        answers.append(token)
    return tuple(answers)


@pytest.mark.parametrize("more", [[], [Threshold(0.3)]])
def test_one_block_size_without_temperature_equals_a_plain_decode(toy, batch, more) -> None:
    tokens, mask = batch(7, 4, 6)
    got, votes = hex_vote(toy, tokens, LENGTH, more, blocks=(4,), temperature=0, mask=mask)
    plain = decode(toy, tokens, LENGTH, [Blocks(4), *more], mask=mask)
    assert got.tokens.equal(plain.tokens)
    assert got.history.step.equal(plain.history.step)
    assert got.history.confidence.equal(plain.history.confidence)
    assert got.nfe == plain.nfe == votes.nfe
    assert votes.runs == ((4, 0),)


def test_the_majority_wins(toy, batch) -> None:
    tokens, mask = batch(7, 4, 6)
    blocks, seeds = (8, 2, 4), (3, 1)
    # The vote is a sum modulo three; empty answers do not vote.
    got, votes = hex_vote(
        toy,
        tokens,
        LENGTH,
        blocks=blocks,
        seeds=seeds,
        mask=mask,
        extract=lambda ids: sum(ids) % 3 if ids else None,
    )
    assert votes.runs == ((2, 3), (2, 1), (4, 3), (4, 1), (8, 3), (8, 1))
    decodes = []
    for size, seed in votes.runs:
        generators = [torch.Generator().manual_seed(seed) for _ in range(3)]
        sampled = [Blocks(size), Gumbel(0.9)]
        decodes.append(decode(toy, tokens, LENGTH, sampled, mask=mask, generator=generators))
    for row in range(3):
        answers = [answer(d.tokens[row, -LENGTH:].tolist()) for d in decodes]
        answers = [sum(ids) % 3 if ids else None for ids in answers]
        count = Counter(s for s in answers if s is not None)
        best = max(count.values(), default=0)
        winner = next(i for i, s in enumerate(answers) if count[s] == best)
        assert votes.winner[row] == winner
        assert got.tokens[row].equal(decodes[winner].tokens[row])
        assert got.history.step[row].equal(decodes[winner].history.step[row])
        assert votes.count(row) == dict(count)
    assert any(votes.winner)
    assert got.nfe == sum(d.nfe for d in decodes) == votes.nfe


def test_ties_go_to_the_smallest_block(toy, batch) -> None:
    tokens, mask = batch(7, 4, 6)
    got, votes = hex_vote(
        toy,
        tokens,
        LENGTH,
        blocks=(12, 3, 6),
        temperature=0,
        mask=mask,
        extract=lambda ids: len(ids) and str(ids),
    )
    for row, answers in enumerate(votes.answers):
        if len(set(answers)) == len(answers):
            assert votes.winner[row] == 0
    assert any(len(set(answers)) == len(answers) for answers in votes.answers)
    small = decode(toy, tokens, LENGTH, [Blocks(3)], mask=mask)
    silent, _ = hex_vote(
        toy, tokens, LENGTH, blocks=(12, 3), temperature=0, mask=mask, extract=lambda ids: None
    )
    assert silent.tokens.equal(small.tokens)


def test_answers_without_extracted_value_do_not_vote(toy, batch) -> None:
    tokens, mask = batch(5)
    calls = iter([None, None, "yes"])
    _, votes = hex_vote(
        toy, tokens, 4, blocks=(4,), seeds=(0, 1, 2), mask=mask, extract=lambda ids: next(calls)
    )
    assert votes.winner == (2,)
    assert votes.count() == {"yes": 1}


def test_votes_of_a_batch_row_equal_those_of_a_single_row(toy, batch) -> None:
    sizes = (7, 4, 6)
    tokens, mask = batch(*sizes)
    options = {"blocks": (2, 8, 64), "seeds": (0, 1), "temperature": 0.5}
    got, votes = hex_vote(toy, tokens, LENGTH, mask=mask, **options)
    for row, size in enumerate(sizes):
        alone, single = hex_vote(toy, tokens[row : row + 1, -size:], LENGTH, **options)
        assert got.tokens[row, -LENGTH:].equal(alone.tokens[0, -LENGTH:])
        assert votes.winner[row] == single.winner[0]
        assert votes.answers[row] == single.answers[0]


def test_blocks_longer_than_the_answer_run_once(toy, batch) -> None:
    tokens, mask = batch(5)
    _, votes = hex_vote(toy, tokens, LENGTH, mask=mask, seeds=(0,))
    assert [size for size, _ in votes.runs] == [8, 12]
    _, votes = hex_vote(toy, tokens, LENGTH, blocks=(8,), mask=mask)
    assert [seed for _, seed in votes.runs] == [0, 1, 2, 3, 4]


def test_given_tokens_and_columns_apply_to_every_candidate(toy, batch) -> None:
    tokens, mask = batch(5, 3)
    canvas = torch.full((2, LENGTH), 2)
    canvas[:, 4] = 17
    _, votes = hex_vote(
        toy, tokens, LENGTH, blocks=(3, 5), mask=mask, canvas=canvas, columns=slice(10, 15)
    )
    for candidate in votes.candidates:
        answers = candidate.tokens[:, -LENGTH:]
        assert (answers[:, 4] == 17).all()
        assert set(answers.flatten().tolist()) <= {*range(10, 15), 17}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"blocks": ()}, "expected at least one of each"),
        ({"seeds": ()}, "expected at least one of each"),
        ({"blocks": (0,)}, "Blocks.size is 0"),
        ({"temperature": -1.0}, "Gumbel.temperature is -1.0"),
        ({"strategies": [Blocks(4)]}, "both decide 'plan'"),
        ({"strategies": [Gumbel()]}, "both decide 'pick'"),
        ({"length": 0}, "length is 0"),
    ],
)
def test_invalid_arguments_of_a_vote_are_rejected(toy, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hex_vote(toy, torch.tensor([[5]]), **{"length": 2, **given})
