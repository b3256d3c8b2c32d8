import json
import math
from pathlib import Path

import pytest
import torch

from mmdlm.decoding.commits.maskgit import MaskGIT
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.schedules import quotas

FILE = Path(__file__).parents[2] / "golden" / "decoding" / "schedules.json"
CASES = json.loads(FILE.read_text())["methods"]["schedule_maskgit"]["cases"]
MODEL = {
    **{"seed": 3, "vocab": 12, "mask_id": 11, "eos_id": None, "shift": 0},
    **{"scale": 8.0, "mix": 0.0, "eos_slope": 0.0},
}


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_curves_give_the_numbers_of_the_reference(case: dict, synthetic) -> None:
    masked, steps, mode = (case["params"][k] for k in ("masked", "steps", "mode"))
    assert quotas(masked, steps, mode) == case["output"]
    chosen = [MaskGIT(steps, mode)]
    got = decode(synthetic(MODEL), torch.tensor([[4, 5]]), masked, chosen)
    filled = got.history.step[0].bincount(minlength=steps)
    assert filled.tolist() == case["output"]
    assert got.nfe == max(i for i, n in enumerate(case["output"]) if n) + 1


def by_hand(n: int, steps: int, mode: str) -> list[int]:
    filled = [0]
    for i in range(steps):
        r = (i + 1) / steps
        share = {
            "cosine": math.cos(math.pi * r / 2),
            "pow3": 1 - r**3,
            "exp": 1 - 2 ** (-math.log2(n) * (1 - r)) if n else 1.0,
            "log": -math.log2(r) / math.log2(n) if n > 1 else 1 - r,
        }[mode]
        filled.append(n - math.floor(n * min(max(share, 1e-6), 1) * (1 - 1e-7)))
    return [b - a for a, b in zip(filled[:-1], filled[1:], strict=True)]


@pytest.mark.parametrize("mode", ["cosine", "pow3", "exp", "log"])
def test_quotas_are_those_computed_by_hand(mode: str) -> None:
    for masks in (13, 0, 1, 40):
        for steps in (1, 4, 17):
            got = quotas(masks, steps, mode)
            assert sum(got) == masks
            assert min(got) >= 0
            want = by_hand(masks, steps, mode)
            assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= 1


def test_the_schedule_of_a_row_follows_its_number_of_masks(synthetic) -> None:
    canvas = torch.full((3, 20), 11)
    canvas[1, :12], canvas[2, 5] = 7, 7
    prompt = torch.tensor([[4], [5], [6]])
    steps = decode(synthetic(MODEL), prompt, 20, [MaskGIT(6, "pow2")], canvas=canvas).history.step
    for row, masks in zip(steps, (20, 8, 19), strict=True):
        assert row[row >= 0].bincount(minlength=6).tolist() == quotas(masks, 6, "pow2")


def test_steps_are_split_over_blocks_and_linear_is_top_k(toy) -> None:
    prompt = torch.tensor([[5, 6, 7]])
    steps = decode(toy(), prompt, 12, [Blocks(6), MaskGIT(6, "cosine")]).history.step[0]
    per_block = quotas(6, 3, "cosine")
    assert steps[:6].bincount(minlength=3).tolist() == per_block
    assert (steps[6:] - 3).bincount(minlength=3).tolist() == per_block
    linear, even = (decode(toy(), prompt, 12, [s]) for s in (MaskGIT(4, "linear"), TopK(4)))
    assert linear.tokens.equal(even.tokens)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "MaskGIT.steps is 0"),
        ({"schedule": "sine"}, "schedule 'sine' is unknown; expected one of cosine, linear"),
        ({"schedule": "pow"}, "schedule 'pow' is unknown"),
    ],
)
def test_bad_arguments_of_maskgit(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskGIT(**given)
