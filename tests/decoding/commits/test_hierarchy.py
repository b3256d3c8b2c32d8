import pytest
import torch

from mmdlm.decoding.commits.hierarchy import Hierarchy


def runs(masked: list[bool]) -> list[list[int]]:
    found: list[list[int]] = []
    for i, is_open in enumerate(masked):
        if is_open and i and masked[i - 1]:
            found[-1].append(i)
        elif is_open:
            found.append([i])
    return found


def oracle(probability: list[float], masked: list[bool], rule: Hierarchy) -> list[int]:
    taken = set()
    for run in runs(masked):
        best = max(run, key=lambda i: (probability[i], -i))
        if rule.low is None or probability[best] > rule.low:
            taken.add(best)
        taken |= {i for i in run if rule.high is not None and probability[i] > rule.high}
    return sorted(taken)


@pytest.mark.parametrize("high", [None, 0.5, 0.9, 1.5])
@pytest.mark.parametrize("low", [None, 0.0, 0.4, 0.8])
def test_commits_the_best_of_every_run_and_all_above_high(
    high: float | None, low: float | None, cases, softmax, moment
) -> None:
    rule = Hierarchy(high, low)
    for logits, masked in cases(24):
        view = moment(logits, masked)
        taken = rule.select(view) & masked
        for i, row in enumerate(logits.tolist()):
            # Odds differ where probabilities round to 1; near a limit float32 may decide otherwise.
            probability = [max(softmax(z)) for z in row]
            if any(abs(p - t) < 1e-6 for p in probability for t in (high, low) if t is not None):
                continue
            order = view.log_odds[i].tolist()
            place = [
                p if p < 0.999 else 0.999 + o / 1e6 for p, o in zip(probability, order, strict=True)
            ]
            want = oracle(place, masked[i].tolist(), rule)
            assert taken[i].nonzero()[:, 0].tolist() == want


def test_of_equal_positions_of_a_run_the_first_commits(moment) -> None:
    logits = torch.tensor([1.0, 0.0]).expand(1, 7, 2)
    masked = torch.tensor([[1, 1, 1, 0, 1, 1, 0]]).bool()
    taken = Hierarchy().select(moment(logits, masked)) & masked
    assert taken[0].nonzero()[:, 0].tolist() == [0, 4]


def test_masks_that_are_not_scored_join_runs(moment) -> None:
    logits = torch.tensor([[1.0, 0], [0, 0], [2.0, 0], [0, 0], [3.0, 0]])[None]
    for known, want in ((None, [False, False, True]), (4, [False, True, True])):
        masked = torch.ones(1, 5).bool()
        if known:
            masked[0, known - 1] = False
        view = moment(logits, masked)
        only = torch.zeros(1, 6, dtype=torch.bool)
        only[0, [1, 3, 5]] = True
        odds = view.log_odds
        view._state.focus(only)
        view._state.log_odds = view._state.confidence = odds[:, ::2]
        assert Hierarchy(None).select(view)[0].tolist() == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"high": -1}, "Hierarchy.high is -1, expected a probability"),
        ({"low": float("nan")}, "Hierarchy.low is nan, expected a probability"),
    ],
)
def test_bad_arguments_of_a_hierarchy(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hierarchy(**given)
