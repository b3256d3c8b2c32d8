import json
import math
from pathlib import Path

import pytest
import torch

from mmdlm.decoding.commits.time_shift import TimeShift, shifted
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks

FILE = Path(__file__).parents[2] / "golden" / "decoding" / "schedules.json"
METHODS = json.loads(FILE.read_text())["methods"]
CASES = METHODS["schedule_lavida"]["cases"]
MODEL = {
    **{"seed": 5, "vocab": 12, "mask_id": 11, "eos_id": None, "shift": 0},
    **{"scale": 8.0, "mix": 0.0, "eos_slope": 0.0},
}


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_counts_are_those_of_the_reference(case: dict, synthetic) -> None:
    params = case["params"]
    chosen = TimeShift(params["steps"], params["shift"] or 3.0, params["schedule"])
    got = decode(synthetic(MODEL), torch.tensor([[4, 5]]), params["masked"], [chosen])
    assert got.history.step[0].bincount().tolist() == case["output"]


def test_counts_are_those_of_the_reference_in_many_sizes() -> None:
    cases = METHODS["lavida_transfer_counts"]["cases"]
    assert len(cases) > 100
    for case in cases:
        masked, steps, schedule, shift = (
            case["params"][k] for k in ("masked", "steps", "schedule", "shift")
        )
        assert shifted(masked, steps, shift or 3.0, schedule) == case["output"]


@pytest.mark.parametrize(("shift", "schedule"), [(3, "shift"), (0.2, "shift"), (1, "cosine")])
def test_counts_sum_to_the_number_of_masks(shift: float, schedule: str) -> None:
    for masks in range(40):
        for steps in (1, 2, 7, 31, 64):
            counts = shifted(masks, steps, shift, schedule)
            assert sum(counts) == masks
            assert len(counts) == min(masks, steps)
            assert min(counts, default=1) >= 1


def test_a_large_shift_commits_most_at_the_end_and_a_small_one_at_the_start() -> None:
    late, early = shifted(64, 16, 3.0, "shift"), shifted(64, 16, 1 / 3, "shift")
    assert sum(late[:8]) < 20
    assert sum(early[:8]) > 44
    assert late[-1] > 3 * late[0]
    assert shifted(64, 16, 1.0, "shift") == [4] * 16


def test_every_row_has_its_own_schedule(synthetic) -> None:
    canvas = torch.full((3, 24), 11)
    canvas[1, :21], canvas[2, 6:8] = 7, 7
    prompt = torch.tensor([[4], [5], [6]])
    got = decode(synthetic(MODEL), prompt, 24, [TimeShift(6)], canvas=canvas).history.step
    for row, masks in zip(got, (24, 3, 22), strict=True):
        assert row[row >= 0].bincount().tolist() == shifted(masks, 6, 3.0, "shift")


def test_by_default_two_tokens_take_one_step(toy) -> None:
    got = decode(toy(), torch.tensor([[5, 6, 7]]), 16, [Blocks(8), TimeShift()])
    counts = shifted(8, 4, 3.0, "shift")
    assert got.nfe == 8
    assert got.history.step[0, :8].bincount().tolist() == counts
    assert (got.history.step[0, 8:] - 4).bincount().tolist() == counts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "TimeShift.steps is 0"),
        ({"shift": 0.0}, "TimeShift.shift is 0.0"),
        ({"shift": math.nan}, "TimeShift.shift is nan"),
        ({"schedule": "linear"}, "TimeShift.schedule is 'linear'"),
    ],
)
def test_bad_arguments_of_a_time_shift(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeShift(**given)
