"""Hierarchical search: how many decodes go on, which, and what it costs."""

import math

import pytest
import torch

from mmdlm.decoding.commits.random_top_k import RandomTopK
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.search.hierarchical import Branch, hierarchical, verifier

MASK, STEPS, LENGTH = 2, 20, 20
PROMPT = torch.tensor([[5, 6, 7]])
CHOSEN = [Gumbel(1.0), TopK(STEPS)]


def count_of_nines(canvases: torch.Tensor) -> list[float]:
    return (canvases == 9).sum(1).double().tolist()


def test_few_trajectories_are_decoded_to_the_end(toy) -> None:
    found = hierarchical(toy, PROMPT, LENGTH, CHOSEN, STEPS, count_of_nines, n=16, keep=2)
    assert found.tokens.shape == (2, LENGTH)
    assert not bool((found.tokens == MASK).any())
    assert list(found.alive) == sorted(found.alive, reverse=True)
    assert (found.alive[0], found.alive[-1], len(found.alive)) == (16, 2, STEPS)
    # The window opens at step 2, when 16 may stay; at step 3 it is 16 / 1.8, and 4 steps later 2.
    assert list(found.alive) == [16] * 3 + [math.ceil(16 / 1.8)] * 4 + [2] * 13
    assert found.forwards == 16 * 3 + 9 * 4 + 2 * 13 < 16 * STEPS / 2
    assert found.scored == 16 + 9 + 2
    assert found.scores == tuple(count_of_nines(found.tokens))
    assert found.scores[0] >= found.scores[1]


def test_survivors_are_the_decodes_of_their_seeds(toy) -> None:
    found = hierarchical(toy, PROMPT, LENGTH, CHOSEN, STEPS, count_of_nines, n=8, keep=3)
    for seed, tokens in zip(found.seeds, found.tokens, strict=True):
        alone = decode(toy, PROMPT, LENGTH, CHOSEN, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(alone.tokens[0, 3:], tokens)


def test_the_cost_grows_with_n_plus_steps_and_not_with_their_product(toy) -> None:
    def cost(n: int) -> int:
        settings = {"n": n, "keep": 1, "interval": 0, "window": (0.0, 1.0)}
        found = hierarchical(toy, PROMPT, LENGTH, CHOSEN, STEPS, count_of_nines, **settings)
        return found.forwards

    for n in (4, 8, 16):
        assert cost(n) <= n * 1.8 / 0.8 + 2 * STEPS  # the geometric sum, and those that stay
    assert cost(16) < 16 * STEPS / 3


def test_the_verifier_prefers_what_the_model_says_yes_to(toy) -> None:
    def ask(canvas: torch.Tensor) -> torch.Tensor:
        return torch.cat([canvas, torch.tensor([11])])

    canvases = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(1))
    found = verifier(toy, ask, [20, 21], [22])(canvases)
    for canvas, value in zip(canvases, found, strict=True):
        with torch.no_grad():
            logits = toy.logits(torch.cat([canvas, torch.tensor([11, MASK])])[None])[0, -1]
        yes, no = logits[[20, 21]].max(), logits[22]
        assert value == pytest.approx(float(torch.sigmoid(yes - no)), abs=1e-6)


def test_settings_out_of_range_are_refused(toy) -> None:
    with pytest.raises(ValueError, match="expected 1 <= keep <= n, decay > 1"):
        hierarchical(toy, PROMPT, LENGTH, CHOSEN, STEPS, count_of_nines, n=2, keep=3)


@pytest.mark.parametrize("branch", [None, Branch(survivors=1)])
def test_images_are_searched_with_guidance_and_given_ids(toy, branch: Branch | None) -> None:
    canvas = torch.full((1, 10), MASK)
    canvas[0, 0], canvas[0, -1] = 4, 5
    found = hierarchical(
        toy,
        PROMPT,
        10,
        [CFG(2.0), RandomTopK(8)],
        8,
        lambda canvases: (canvases == 25).sum(1).double().tolist(),
        n=6,
        keep=2,
        interval=1,
        branch=branch,
        canvas=canvas,
        columns=slice(20, 36),
        alternatives={"text": PROMPT[:, :1]},
    )
    assert found.tokens[:, 0].tolist() == [4, 4]
    assert found.tokens[:, -1].tolist() == [5, 5]
    assert bool(((found.tokens[:, 1:-1] >= 20) & (found.tokens[:, 1:-1] < 36)).all())
    assert (found.alive[-1], len(found.alive)) == (2, 8)
    assert found.forwards < 6 * 8
