"""Branches of the hierarchical search: copies of survivors, with some of their tokens masked."""

import math

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.decoding.session import Session
from mmdlm.search.hierarchical import Branch, hierarchical

MASK, STEPS, LENGTH = 2, 20, 20
PROMPT = torch.tensor([[5, 6, 7]])
CHOSEN = [Gumbel(1.0), TopK(STEPS)]


def count_of_nines(canvases: Tensor) -> list[float]:
    return (canvases == 9).sum(1).double().tolist()


@pytest.mark.parametrize("pool", [1.0, 2.0, math.inf])
def test_tokens_of_low_confidence_are_masked_again(pool: float) -> None:
    canvas = torch.tensor([4, MASK, 5, 6, 7, MASK, 8, 9, 10])
    confidence = torch.tensor([0.9, 0.0, 0.2, 0.5, 0.1, 0.0, 0.7, 0.3, 0.0])  # the last is given
    ranked, seen = [4, 2, 7, 3, 6, 0], set()
    for seed in range(60):
        again = Branch(tokens=2, pool=pool).again(canvas, confidence, seed)
        chosen = again.nonzero()[:, 0].tolist()
        assert len(chosen) == 2
        seen |= set(chosen)
    assert seen == set(ranked[: int(min(2 * pool, 6))])
    every = Branch(tokens=50).again(canvas, confidence, 0)
    assert every.nonzero()[:, 0].tolist() == sorted(ranked)


def test_survivors_go_on_and_their_copies_differ_from_them(toy, monkeypatch) -> None:
    copies, fork = [], Session.fork

    def noted(self, key, **given):
        before = self.canvas(key)
        copy = fork(self, key, **given)
        copies.append((key, copy, before, self.canvas(copy)))
        return copy

    monkeypatch.setattr(Session, "fork", noted)
    branch = Branch(survivors=2, tokens=1)
    settings = {"n": 16, "keep": 4, "branch": branch}
    found = hierarchical(toy, PROMPT, LENGTH, CHOSEN, STEPS, count_of_nines, **settings)
    # 16 until step 2, then 9 of which 7 are copies, then 4 of which 2 are.
    assert [len(copies), found.alive[3], found.alive[-1]] == [9, 9, 4]
    for _, _, before, after in copies:
        again = before != after
        assert int(again.sum()) == 1
        assert (after[again] == MASK).all()
    assert [len({key for key, *_ in part}) for part in (copies[:7], copies[7:])] == [2, 2]
    assert found.tokens.shape == (4, LENGTH)
    assert not bool((found.tokens == MASK).any())
    assert len({tuple(row) for row in found.tokens.tolist()}) == 4
    own = [(seed, each) for seed, each in zip(found.seeds, found.tokens, strict=True) if seed < 16]
    assert own
    for seed, tokens in own:
        alone = decode(toy, PROMPT, LENGTH, CHOSEN, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(alone.tokens[0, 3:], tokens)
    assert found.scores == tuple(count_of_nines(found.tokens))


def test_branches_cost_no_more_steps(toy) -> None:
    """The number of forwards grows with n plus the steps, not with their product."""

    def cost(n: int) -> int:
        settings = {"n": n, "keep": 1, "interval": 0, "window": (0.0, 1.0), "branch": Branch()}
        found = hierarchical(toy, PROMPT, LENGTH, CHOSEN, STEPS, count_of_nines, **settings)
        assert found.forwards == sum(found.alive)
        assert len(found.alive) == STEPS  # the schedule takes the masks into the steps left
        assert found.nfe == STEPS  # all trajectories run in one batch
        return found.forwards

    for n in (4, 8, 16, 32):
        assert cost(n) <= n * 1.8 / 0.8 + 2 * STEPS  # the geometric sum, and those that stay
    assert cost(32) < 32 * STEPS / 5


def test_blocks_are_opened_again_for_their_masks(toy) -> None:
    chosen = [Gumbel(1.0), Blocks(5), TopK(STEPS)]
    settings = {"n": 8, "keep": 2, "branch": Branch(tokens=3, pool=math.inf), "interval": 1}
    found = hierarchical(toy, PROMPT, LENGTH, chosen, STEPS, count_of_nines, **settings)
    assert found.tokens.shape == (2, LENGTH)
    assert not bool((found.tokens == MASK).any())
    # A copy does its masks again, and the block that was open from its first step on.
    assert STEPS <= len(found.alive) <= STEPS + 2 * (3 + 5)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="Branch.survivors is 0"):
        Branch(survivors=0)
    with pytest.raises(ValueError, match="Branch.pool is 0.5"):
        Branch(pool=0.5)
