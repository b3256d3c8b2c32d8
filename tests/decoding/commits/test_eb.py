import math

import pytest
import torch

from mmdlm.decoding.commits.eb import EntropyBound
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.scores.entropy import Entropy
from mmdlm.decoding.scores.margin import Margin

PROMPT = torch.tensor([[3, 4, 5], [6, 7, 8]])


def entropy(p: list[float]) -> float:
    return -sum(q * math.log(q) for q in p if q > 0)


def longest(nats: list[float], gamma: float) -> tuple[int, float]:
    """Length of the longest list within the bound, and the smallest distance of a sum to it."""
    sums = [sum(nats[:n]) - max(nats[:n]) for n in range(1, len(nats) + 1)]
    gap = min((abs(s - gamma) for s in sums), default=1.0)
    return max((n for n, s in enumerate(sums, 1) if s <= gamma), default=0), gap


@pytest.mark.parametrize("order", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("gamma", [1e-3, 0.1, 1.0, 3.0, 99.0])
def test_commits_the_longest_list_within_the_bound(
    gamma: float, order: str, cases, softmax, moment
) -> None:
    rule = EntropyBound(gamma, order)
    for logits, masked in cases(27):
        view = moment(logits, masked, rule)
        score = rule.score(view, logits, view.candidates)
        view._state.confidence = score.masked_fill(~masked, -torch.inf)
        taken = rule.select(view) & masked
        for i, row in enumerate(logits.tolist()):
            is_open = masked[i].nonzero()[:, 0].tolist()
            # The order is that of the score, which has a test of its own.
            ranked = sorted(is_open, key=lambda j: (-float(view.confidence[i, j]), j))
            count, gap = longest([entropy(softmax(row[j])) for j in ranked], gamma)
            if gap > 1e-5:
                assert taken[i].nonzero()[:, 0].tolist() == sorted(ranked[:count])


def test_the_largest_entropy_does_not_count(moment) -> None:
    certain, even = [30.0, 0.0], [0.0, 0.0]
    for rows, want in (([certain, even, certain], 3), ([even, certain, even], 2)):
        logits = torch.tensor([rows])
        rule = EntropyBound(1e-3)
        view = moment(logits, torch.ones(1, 3).bool(), rule)
        view._state.confidence = rule.score(view, logits, view.candidates)
        assert int(rule.select(view).sum()) == want


@pytest.mark.parametrize(
    ("order", "alone"), [("confidence", []), ("entropy", [Entropy()]), ("margin", [Margin()])]
)
def test_a_bound_of_zero_commits_one_per_step_and_of_infinity_all_at_once(
    order: str, alone: list, toy
) -> None:
    tight, one = (
        decode(toy(), PROMPT, 8, s) for s in ([EntropyBound(0.0, order)], [TopK(), *alone])
    )
    assert tight.tokens.equal(one.tokens)
    assert tight.history.step.equal(one.history.step)
    assert decode(toy(), PROMPT, 8, [EntropyBound(math.inf, order)]).nfe == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gamma": -1.0}, "EntropyBound.gamma is -1.0, expected at least 0"),
        (
            {"order": "size"},
            "EntropyBound.order is 'size', expected one of 'confidence',",
        ),
    ],
)
def test_bad_arguments_of_an_entropy_bound(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EntropyBound(**given)
