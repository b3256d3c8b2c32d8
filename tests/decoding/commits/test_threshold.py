import pytest
import torch

from mmdlm.decoding.commits.threshold import Threshold


@pytest.mark.parametrize("tau", [0, 0.0, 0.3, 0.5, 0.9, 0.999, 1.0, 1.5])
def test_commits_what_reaches_tau(tau: float, cases, softmax, moment) -> None:
    for logits, masked in cases(5):
        state = moment(logits, masked)
        taken = Threshold(tau).select(state) & masked
        for i, row in enumerate(logits.tolist()):
            sure = [max(softmax(z)) for z in row]
            if any(abs(p - tau) < 1e-6 for p in sure):
                continue  # float32 may see it on the other side
            want = [p >= tau and bool(m) for p, m in zip(sure, masked[i], strict=True)]
            assert taken[i].tolist() == want


def oracle(sure: list[bool], order: list[int], masks: int, steps: int, now: int) -> list[int]:
    """As the reference: quota of the step and what earlier steps left over; then what is sure."""
    quotas = [masks // steps + (1 if i < masks % steps else 0) for i in range(steps)]
    due = sum(quotas[: now + 1]) if now < steps else masks
    budget = due - (masks - len(order))
    return sorted(i for i in order[: max(budget, 0)] if sure[i])


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_never_ahead_of_its_schedule(steps: int, cases, moment) -> None:
    for n, (logits, masked) in enumerate(cases(6)):
        now, masks = n % 5, masked.sum(1) + n % 3
        state = moment(logits, masked, now, masks)
        taken = Threshold(0.6, steps).select(state) & masked
        for i in range(len(masked)):
            sure = (state.log_odds[i].sigmoid() >= 0.6).tolist()
            open_at = [j for j in range(len(sure)) if masked[i, j]]
            order = sorted(open_at, key=lambda j: (-state.confidence[i, j].item(), j))
            want = oracle(sure, order, int(masks[i]), steps, now)
            assert taken[i].nonzero()[:, 0].tolist() == want


def test_only_a_token_without_rival_reaches_one(moment) -> None:
    logits = torch.tensor([[[60.0, 0.0], [0.0, -torch.inf]]])
    state = moment(logits, torch.ones(1, 2).bool())
    assert Threshold(1.0).select(state).tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tau": -0.1}, "Threshold.tau is -0.1"),
        ({"tau": float("nan")}, "Threshold.tau is nan"),
        ({"steps": 0}, "Threshold.steps is 0"),
    ],
)
def test_bad_arguments_of_a_threshold(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Threshold(**given)
