import pytest
import torch

from mmdlm.decoding.commits.dynamic import Dynamic
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode


def oracle(probability: dict[int, float], tau: float, due: int) -> list[int]:
    """`low_confidence_dynamic` of the reference, where there are as many masks as are due."""
    above = [i for i, p in probability.items() if p > tau]
    if len(above) >= due:
        return above
    return sorted(sorted(probability, key=lambda i: (-probability[i], i))[:due])


def schedule(size: int, steps: int) -> list[int]:
    return [size // steps + (i < size % steps) for i in range(steps)]


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6, 1.0])
def test_commits_all_above_tau_or_as_many_as_are_due(
    tau: float, steps: int, cases, softmax, moment
) -> None:
    for n, (logits, masked) in enumerate(cases(11, 30)):
        size = logits.shape[1]
        due = schedule(size, steps)[n % steps]
        view = moment(logits, masked, block_step=n % steps)
        taken = Dynamic(steps, tau).select(view) & masked
        for i, row in enumerate(logits.tolist()):
            probability = {j: max(softmax(row[j])) for j in range(size) if masked[i, j]}
            if any(abs(p - tau) < 1e-6 for p in probability.values()):
                continue  # float32 may decide otherwise
            assert taken[i].nonzero()[:, 0].tolist() == oracle(probability, tau, due)


def test_a_probability_must_exceed_tau_not_reach_it(moment) -> None:
    two_even = torch.zeros(1, 3, 2)
    view = moment(two_even, torch.ones(1, 3).bool())
    assert Dynamic(tau=0.5).select(view).tolist() == [[True, False, False]]
    assert Threshold(0.5).select(view).tolist() == [[True, True, True]]


def test_nothing_exceeds_one(moment) -> None:
    certain = torch.tensor([[[200.0, 0.0], [300.0, 0.0], [0.0, 250.0]]])
    view = moment(certain, torch.ones(1, 3).bool())
    assert Dynamic(tau=1).select(view).tolist() == [[False, True, False]]
    assert Dynamic(2, tau=1).select(view).tolist() == [[False, True, True]]


@pytest.mark.parametrize("shift", [False, True])
def test_the_number_due_depends_on_the_block_and_not_on_its_masks(shift: bool, toy) -> None:
    model = toy(attention="block_causal", block_size=8, shift=shift)
    # Blocks of 8 in 3 steps owe 3, 3 and 2; the first holds 3 tokens of the prompt and 5 masks.
    got = decode(model, torch.tensor([[3, 4, 5]]), 13, [Dynamic(3, tau=1)]).history.step[0]
    assert got[:5].bincount().tolist() == [3, 2]
    assert got[5:].bincount().tolist() == [0, 0, 3, 3, 2]


def test_more_steps_than_positions_are_one_per_position(toy) -> None:
    model, prompt = toy(attention="block_causal", block_size=4), torch.tensor([[3, 4, 5]])
    many, one = (decode(model, prompt, 9, [Dynamic(s, 0.4)]) for s in (32, None))
    assert many.tokens.equal(one.tokens)
    assert many.history.step.equal(one.history.step)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps_per_block": 0}, "Dynamic.steps_per_block is 0, expected at least 1"),
        ({"tau": -0.1}, "Dynamic.tau is -0.1, expected a probability"),
        ({"tau": float("nan")}, "Dynamic.tau is nan, expected a probability"),
    ],
)
def test_bad_arguments_of_dynamic(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dynamic(**given)
