import pytest
import torch

from mmdlm.decoding.commits.local_leap import LocalLeap
from mmdlm.decoding.commits.threshold import Threshold


def oracle(probability: dict[int, float], rule: LocalLeap) -> list[int]:
    anchors = [i for i, p in probability.items() if p >= rule.tau]

    def limit(i: int) -> float:
        near = any(abs(i - a) <= rule.radius for a in anchors)
        return rule.relaxed if near else rule.tau

    return [i for i, p in probability.items() if p >= limit(i)]


@pytest.mark.parametrize("radius", [0, 1, 2, 9])
@pytest.mark.parametrize(("tau", "relaxed"), [(0.9, 0.75), (0.7, 0.3), (0.6, 0.0), (1.5, 0.2)])
def test_commits_at_the_lower_threshold_near_anchors(
    tau: float, relaxed: float, radius: int, cases, softmax, moment
) -> None:
    rule = LocalLeap(tau, relaxed, radius)
    for logits, masked in cases(22):
        taken = rule.select(moment(logits, masked)) & masked
        for row, got, is_open in zip(logits.tolist(), taken, masked, strict=True):
            probability = {i: max(softmax(z)) for i, z in enumerate(row) if is_open[i]}
            if all(min(abs(p - tau), abs(p - relaxed)) > 1e-6 for p in probability.values()):
                assert got.nonzero()[:, 0].tolist() == oracle(probability, rule)


def test_distance_is_counted_on_the_canvas_and_not_in_the_scored_positions(moment) -> None:
    # An anchor and two positions above `relaxed`; only every third position is scored.
    logits = torch.tensor([[3.0, 0], [0, 0], [0, 0], [1.5, 0], [0, 0], [0, 0], [1.5, 0]])[None]
    view = moment(logits, torch.ones(1, 7).bool())
    only = torch.zeros(1, 8, dtype=torch.bool)
    only[0, [1, 4, 7]] = True
    odds = view.log_odds
    view._state.focus(only)
    view._state.log_odds = odds[:, ::3]
    taken = [LocalLeap(0.9, 0.75, radius).select(view)[0].tolist() for radius in (2, 3, 6)]
    assert taken == [[True, False, False], [True, True, False], [True, True, True]]


@pytest.mark.parametrize("rule", [LocalLeap(0.8, 0.8, 3), LocalLeap(0.8, 0.2, 0)])
def test_without_relaxation_it_is_a_threshold(rule: LocalLeap, cases, moment) -> None:
    for logits, masked in cases(23):
        view = moment(logits, masked)
        assert (rule.select(view) & masked).equal(Threshold(0.8).select(view) & masked)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tau": -1}, "LocalLeap.tau is -1, expected a probability"),
        ({"relaxed": 0.95}, r"LocalLeap.relaxed is 0.95, .*at most tau \(0.9\)"),
        ({"relaxed": float("nan")}, "LocalLeap.relaxed is nan"),
        ({"radius": -1}, "LocalLeap.radius is -1, expected at least 0"),
    ],
)
def test_bad_arguments_of_local_leap(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalLeap(**given)
