import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from mmdlm.decoding.commits.sched import SchED
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.timesteps import Timesteps
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.entropy import Entropy
from mmdlm.decoding.scores.margin import Margin
from mmdlm.decoding.scores.probability import Probability

GOLDEN = Path(__file__).parents[2] / "golden" / "decoding" / "history.json"
METHODS = json.loads(GOLDEN.read_text())["methods"]
KINDS = {"maskgit_plus": Probability, "topk_margin": Margin, "entropy": Entropy}
INF = float("inf")


def each(method: str) -> pytest.MarkDecorator:
    cases = METHODS[method]["cases"]
    return pytest.mark.parametrize("case", cases, ids=range(len(cases)))


@each("sched_threshold")
def test_the_threshold_is_that_of_sched(case: dict) -> None:
    given = case["params"]
    sched = SchED(given["mode"], given["tau_high"], given["tau_low"], given["k"])
    bar = sched.bar(torch.tensor([given["step"]]), given["total"])
    assert bar.item() == pytest.approx(case["output"], abs=1e-6)


@each("sched_generate")
def test_rollout_is_that_of_sched(case: dict, synthetic) -> None:
    given, output = case["params"], case["output"]
    chosen = [
        Timesteps(given["steps"]),
        KINDS[given["alg"]](),
        SchED(
            given["tau_mode"],
            given["tau_high"],
            given["tau_low"],
            given["tau_k"],
            given["stat"],
            max_change=given["max_change_ratio"],
            steps=given["steps"],
        ),
    ]
    prompt = torch.tensor([case["prompt"]])
    got = decode(synthetic(case["model"]), prompt, given["max_new_tokens"], chosen)
    assert got.tokens.tolist() == [output["sequence"]]
    assert got.nfe == output["steps_taken"]


def quantile(values: list[float], q: float) -> float:
    values, place = sorted(values), q * (len(values) - 1)
    low = math.floor(place)
    return values[low] + (place - low) * (values[math.ceil(place)] - values[low])


@pytest.mark.parametrize("q", [0.0, 0.2, 0.7, 1.0])
def test_statistics_are_of_the_masks_of_each_row(q: float, cases) -> None:
    for logits, masked in cases(9):
        margins = logits[..., 0].abs()
        got = {
            name: SchED(statistic=name, quantile=q).aggregate(margins, masked).tolist()
            for name in ("mean", "median", "quantile")
        }
        for i, row in enumerate(margins.tolist()):
            mine = [z for z, m in zip(row, masked[i], strict=True) if m]
            if not mine:
                assert {got[name][i] for name in got} == {-INF}
                continue
            assert got["mean"][i] == pytest.approx(statistics.mean(mine), rel=1e-5)
            assert got["median"][i] == statistics.median_low(mine)
            assert got["quantile"][i] == pytest.approx(quantile(mine, q), rel=1e-5)


@pytest.mark.parametrize("patience", [0, 1, 2])
def test_stops_once_the_best_tokens_are_stable(patience: int, moment) -> None:
    """Best tokens of two masks over six steps; at most half of them may change."""
    sched, rounds = SchED(high=0.0, low=0.0, max_change=0.5, patience=patience, steps=6), []
    logits = torch.zeros(1, 2, 4)
    view = moment(logits, torch.ones(1, 2, dtype=torch.bool), sched)
    for best in ((0, 0), (0, 1), (1, 0), (1, 0), (1, 2), (1, 2)):
        now = logits.clone()
        now[0, range(2), best] = 9.0
        sched.observe(view, now)
        rounds.append(sched.stop(view).item())
    stable = [0, 1, 0, 1, 2, 3]  # changes: all are new at first, one, both, none, one, none
    assert rounds == [steps > patience for steps in stable]


@pytest.mark.parametrize("mode", ["linear", "cosine", "exp"])
@pytest.mark.parametrize("statistic", ["mean", "median", "quantile"])
def test_an_infinite_threshold_changes_nothing(mode: str, statistic: str, toy, run) -> None:
    base = [Blocks(4), Threshold(0.3)]
    never = run(toy(), *base, SchED(mode, INF, INF, statistic=statistic))
    plain = run(toy(), *base)
    assert never.tokens.equal(plain.tokens)
    assert never.history.step.equal(plain.history.step)
    assert run(toy(), TopK(), SchED(mode, 0.0, 0.0, statistic=statistic)).nfe == 1


def test_rows_stop_independently(toy, prompts) -> None:
    tokens, mask = prompts(7, 4, 6)
    chosen = [Blocks(3), Threshold(0.3), SchED(high=1.5, low=0.1, max_change=0.3, patience=1)]
    batch = decode(toy(), tokens, 12, chosen, mask=mask)
    assert batch.history.step.amax(1).unique().numel() > 1
    for i, size in enumerate((7, 4, 6)):
        alone = decode(toy(), tokens[i : i + 1, -size:], 12, chosen)
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()
        assert batch.history.step[i].tolist() == alone.history.step[0].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "step"}, "SchED.mode is 'step', expected one of 'linear', 'cosine', 'exp'"),
        ({"statistic": "max"}, "SchED.statistic is 'max', expected one of 'mean', 'median'"),
        ({"low": -1}, "SchED.low is -1, expected at least 0"),
        ({"quantile": 1.1}, "SchED.quantile is 1.1, expected at least 0 and at most 1"),
        (
            {"max_change": float("nan")},
            "SchED.max_change is nan, expected at least 0 and",
        ),
        ({"patience": -1}, "SchED.patience is -1, expected at least 0"),
        ({"steps": 0}, "SchED.steps is 0, expected at least 1"),
    ],
)
def test_bad_arguments_of_sched(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SchED(**given)
