import numpy as np
import pytest
import torch

from mmdlm.decoding.commits.timesteps import Timesteps
from mmdlm.decoding.decode import decode


def oracle(masks: int, steps: int, eps: float, kind: type = np.float32) -> list[int]:
    """How many tokens each step commits, with the float32 numbers of the reference."""
    levels = torch.linspace(1, eps, steps + 1, dtype=torch.float64).numpy()
    if kind is np.float32:
        levels = torch.linspace(1, eps, steps + 1).numpy()
    out = []
    for i in range(steps):
        fall = kind(1) - levels[i + 1] / levels[i]
        out.append(masks if i == steps - 1 else int(kind(masks) * fall))
        masks -= out[-1]
    return out


def committed(toy, masks: int, steps: int, eps: float) -> tuple[list[int], int]:
    """How many tokens each step commits, and the forwards."""
    got = decode(toy(), torch.tensor([[3, 4]]), masks, [Timesteps(steps, eps)])
    return [int((got.history.step == i).sum()) for i in range(steps)], got.nfe


@pytest.mark.parametrize(("masks", "steps"), [(11, 1), (11, 3), (11, 8), (11, 11), (11, 20)])
@pytest.mark.parametrize("eps", [1e-3, 0.3])
def test_follows_the_levels(masks: int, steps: int, eps: float, toy) -> None:
    counts, nfe = committed(toy, masks, steps, eps)
    assert counts == oracle(masks, steps, eps)
    # A decode ends with its last mask; the reference runs the remaining steps.
    assert nfe == max(i for i, n in enumerate(counts) if n) + 1


@pytest.mark.parametrize(
    ("masks", "steps", "eps"), [(4, 3, 0.25), (5, 3, 0.5), (8, 6, 0.25), (5, 12, 0.2)]
)
def test_truncates_as_float32_does(masks: int, steps: int, eps: float, toy) -> None:
    counts, _ = committed(toy, masks, steps, eps)
    assert counts == oracle(masks, steps, eps)
    assert counts != oracle(masks, steps, eps, np.float64)


def test_idle_steps_cost_a_forward(toy) -> None:
    got = decode(toy(), torch.tensor([[3, 4]]), 8, [Timesteps(16)])
    assert got.nfe == 16
    assert len(got.history.step.unique()) < 16


def test_commits_the_most_confident(cases, moment) -> None:
    for logits, masked in cases(8):
        taken = Timesteps(logits.shape[1] - 1 or 1).select(moment(logits, masked)) & masked
        confidence = moment(logits, masked).confidence
        for row, is_open, scores in zip(taken, masked, confidence, strict=True):
            inside, outside = scores[row], scores[is_open & ~row]
            if len(inside) and len(outside):
                assert inside.min() >= outside.max()


@pytest.mark.parametrize("given", [{"steps": 0}, {"eps": 0.0}, {"eps": 1.0}, {"eps": float("nan")}])
def test_bad_arguments_of_timesteps(given: dict) -> None:
    with pytest.raises(ValueError, match="Timesteps"):
        Timesteps(**given)
