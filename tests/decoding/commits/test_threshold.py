import pytest
import torch

from mmdlm.decoding.commits.threshold import Threshold


@pytest.mark.parametrize("tau", [0, 0.0, 0.3, 0.5, 0.9, 0.999, 1.0, 1.5])
def test_commits_what_reaches_tau(tau: float, cases, softmax, moment) -> None:
    for logits, masked in cases(5):
        view = moment(logits, masked)
        taken = Threshold(tau).select(view) & masked
        for i, row in enumerate(logits.tolist()):
            probability = [max(softmax(z)) for z in row]
            if any(abs(p - tau) < 1e-6 for p in probability):
                continue  # float32 may decide otherwise
            want = [p >= tau and bool(m) for p, m in zip(probability, masked[i], strict=True)]
            assert taken[i].tolist() == want


def oracle(passes: list[bool], order: list[int], masks: int, steps: int, now: int) -> list[int]:
    """The reference: of the quota of this step and the rest of earlier ones, what reaches `tau`."""
    quotas = [masks // steps + (1 if i < masks % steps else 0) for i in range(steps)]
    due = sum(quotas[: now + 1]) if now < steps else masks
    budget = due - (masks - len(order))
    return sorted(i for i in order[: max(budget, 0)] if passes[i])


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_never_ahead_of_its_schedule(steps: int, cases, moment) -> None:
    for n, (logits, masked) in enumerate(cases(6)):
        now, masks = n % 5, masked.sum(1) + n % 3
        view = moment(logits, masked, block_step=now, block_masks=masks)
        taken = Threshold(0.6, steps).select(view) & masked
        for i in range(len(masked)):
            passes = (view.log_odds[i].sigmoid() >= 0.6).tolist()
            open_at = [j for j in range(len(passes)) if masked[i, j]]
            order = sorted(open_at, key=lambda j: (-view.confidence[i, j].item(), j))
            want = oracle(passes, order, int(masks[i]), steps, now)
            assert taken[i].nonzero()[:, 0].tolist() == want


def test_only_the_single_possible_token_reaches_one(moment) -> None:
    logits = torch.tensor([[[60.0, 0.0], [0.0, -torch.inf]]])
    view = moment(logits, torch.ones(1, 2).bool())
    assert Threshold(1.0).select(view).tolist() == [[False, True]]


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
