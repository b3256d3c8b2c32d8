import json
from pathlib import Path

import pytest
import torch

from mmdlm.decoding.commits.ccd import CCD
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.entropy import Entropy

GOLDEN = Path(__file__).parents[2] / "golden" / "decoding" / "history.json"
CASES = json.loads(GOLDEN.read_text())["methods"]["ccd_generate"]["cases"]


def filled(got: Decoded, prompt: int, step: int) -> list[int]:
    return [i + prompt for i in (got.history.step[0] == step).nonzero()[:, 0].tolist()]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_rollout_is_that_of_ccd(case: dict, synthetic) -> None:
    given, output, size = case["params"], case["output"], len(case["prompt"])
    ccd = CCD(given["steps"], given["seek_mode"], given["expand_ratio"], given["warm_up_steps"])
    prompt = torch.tensor([case["prompt"]])
    got = decode(synthetic(case["model"]), prompt, given["gen_length"], [Entropy(), ccd])
    assert got.tokens.tolist() == [output["sequence"]]
    assert got.nfe == output["nfe"]
    assert [filled(got, size, i) for i in range(got.nfe)] == output["commits"]


class OneRow:
    """The released algorithm for one row, with lists and sets."""

    def __init__(self, given: CCD, count: int, steps: int) -> None:
        self.given, self.count, self.steps = given, count, steps
        self.due, self.size, self.step = max(1, count // steps), 1, 0
        self.noted: list[int] = []
        self.before: dict[int, int] = {}

    def take(self, confidence: dict[int, float], guess: dict[int, int]) -> list[int]:
        if len(confidence) <= 0.1 * self.count:
            self.size = 1
        most = self.due + int(self.due * self.given.expand)
        growing = self.step >= max(1, self.given.warm_up - 1)
        self.size = min(self.size + 1, most) if growing else 1
        order = sorted(confidence, key=lambda i: (-confidence[i], i))
        taken = order[: self.due]
        if self.step == self.steps - 1:
            taken = order
        elif self.step >= self.given.warm_up and set(taken) & set(self.noted):
            stay = [i for i in order[: self.size] if i in self.noted]
            stay = [i for i in stay if guess[i] == self.before.get(i)]
            if len(stay) >= self.due:
                taken = stay if self.given.dynamic else stay[: self.due]
        self.noted = [i for i in order if i not in taken][: self.size]
        self.before, self.step = guess, self.step + 1
        return sorted(taken)


@pytest.mark.parametrize(
    "given",
    [CCD(), CCD(dynamic=True), CCD(6, True, 2.0, 1), CCD(6, False, 1.5, 2), CCD(7, True, 0.0)],
)
def test_two_rows_commit_as_the_reference_for_one_row(given: CCD, moment) -> None:
    count, generator = 20, torch.Generator().manual_seed(6)
    masked = torch.ones(2, count, dtype=torch.bool)
    steps = given.steps or count
    rows, memory = [OneRow(given, count, steps) for _ in masked], None
    base = 2 * torch.randn(2, count, 5, generator=generator)
    for step in range(steps):
        logits = base + 0.4 * torch.randn(base.shape, generator=generator)
        view = moment(logits, masked, given, block_step=step, block_masks=torch.full((2,), count))
        memory = memory or view.memory(given)
        view._state.memories[id(given)] = memory
        taken = given.select(view)
        for i, row in enumerate(rows):
            here = masked[i].nonzero()[:, 0].tolist()
            confidence = {j: view.confidence[i, j].item() for j in here}
            want = row.take(confidence, {j: view.candidates[i, j].item() for j in here})
            assert taken[i].nonzero()[:, 0].tolist() == want
        masked = masked & ~taken
    assert not masked.any()


@pytest.mark.parametrize("dynamic", [False, True])
def test_within_the_warm_up_it_is_top_k(dynamic: bool, toy, run) -> None:
    warm, plain = run(toy(), CCD(4, dynamic, warm_up=4)), run(toy(), TopK(4))
    assert warm.tokens.equal(plain.tokens)
    assert warm.history.step.equal(plain.history.step)


def test_each_block_has_its_warm_up(toy, run) -> None:
    got = run(toy(), Blocks(4), CCD(dynamic=True, warm_up=4)).history.step
    assert got.equal(run(toy(), Blocks(4), TopK()).history.step)


def test_steps_that_do_not_divide_the_answer_fill_it(toy, run) -> None:
    got = run(toy(), CCD(3))
    assert got.nfe == 3
    assert got.history.step.sort(1).values.tolist() == [[0, 0, 1, 1, 2, 2, 2, 2]] * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "CCD.steps is 0, expected at least 1"),
        ({"expand": -1.0}, "CCD.expand is -1.0, expected at least 0"),
        ({"warm_up": 0}, "CCD.warm_up is 0, expected at least 1"),
    ],
)
def test_bad_arguments_of_ccd(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CCD(**given)
