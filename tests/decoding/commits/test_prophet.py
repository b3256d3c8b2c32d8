import json
from pathlib import Path

import pytest
import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.commits.prophet import Prophet
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.ada_block import AdaBlock
from mmdlm.decoding.plans.blocks import Blocks

GOLDEN = Path(__file__).parents[2] / "golden" / "decoding" / "history.json"
METHODS = json.loads(GOLDEN.read_text())["methods"]
INF = float("inf")


def each(method: str) -> pytest.MarkDecorator:
    cases = METHODS[method]["cases"]
    return pytest.mark.parametrize("case", cases, ids=range(len(cases)))


@each("prophet_rule")
def test_the_threshold_is_that_of_prophet(case: dict) -> None:
    given = case["params"]
    prophet = Prophet(given["early"], given["mid"], given["late"])
    bar = prophet.bar(torch.tensor([given["step"]]), given["total"])
    assert (torch.tensor([given["gap"]]) >= bar).tolist() == [case["output"]]


@each("prophet_generate")
def test_rollout_is_that_of_prophet(case: dict, synthetic) -> None:
    params, output, start = case["params"], case["output"], case["params"]["answer_start"]
    chosen = [
        Blocks(params["block_length"]),
        TopK(params["steps"]),
        Prophet(steps=params["steps"], region=(start, start + 5)),
    ]
    prompt = torch.tensor([case["prompt"]])
    got = decode(synthetic(case["model"]), prompt, params["gen_length"], chosen)
    assert got.tokens.tolist() == [output["sequence"]]
    assert got.nfe == output["nfe"] == output["exit_step"]


def by_hand(logits: list, masked: list, prophet: Prophet, step: int) -> bool:
    """One row in its step number `step` (from 1), of as many steps as it has positions."""
    used = [i for i, m in enumerate(masked) if m]
    if prophet.region is not None:
        used = list(range(*prophet.region))
    if not used or not any(masked):
        return False
    margins = [sorted(logits[i])[-1] - sorted(logits[i])[-2] for i in used]
    progress = step / len(logits)
    bar = prophet.early if progress < 0.33 else prophet.mid if progress < 0.67 else prophet.late
    return sum(margins) / len(margins) >= bar


@pytest.mark.parametrize("region", [None, (0, 1)])
def test_stops_when_the_mean_margin_reaches_the_threshold(
    region: tuple | None, cases, moment
) -> None:
    prophet, seen = Prophet(1.2, 0.9, 0.6, region=region), set()
    for n, (logits, masked) in enumerate(cases(4)):
        view = moment(logits, masked, prophet)
        steps = 1 + n % logits.shape[1]
        for _ in range(steps):
            prophet.observe(view, logits)
            got = prophet.stop(view)
            view._state.step += 1
        want = [
            by_hand(*row, prophet, steps)
            for row in zip(logits.tolist(), masked.tolist(), strict=True)
        ]
        # A finished row has left the batch: what stop returns for rows without masks is not used.
        assert (got & masked.any(1)).tolist() == want
        seen |= set(want)
    assert seen == {True, False}


@pytest.mark.parametrize("more", [[], [DualCache()]])
def test_an_infinite_threshold_changes_nothing(more: list, toy, run) -> None:
    base = [Blocks(4), Threshold(0.3), *more]
    never, plain = run(toy(), *base, Prophet(INF, INF, INF)), run(toy(), *base)
    assert never.tokens.equal(plain.tokens)
    assert never.history.step.equal(plain.history.step)
    assert run(toy(), TopK(), Prophet(0.0, 0.0, 0.0)).nfe == 1


def test_with_a_cache_only_computed_positions_commit(toy, run) -> None:
    """A full pass can commit the whole answer, a pass over the block only the block."""
    later_region = Prophet(INF, 0.0, 0.0, region=(6, 8))
    got = run(toy(), Blocks(4), DualCache(), later_region).history.step
    # A third of 8 steps is over in the third, within the first block; its region comes at step 4.
    assert got[:, :4].sort(1).values.tolist() == [[0, 1, 2, 3]] * 3
    assert got[:, 4:].tolist() == [[4] * 4] * 3
    without = run(toy(), Blocks(4), later_region).history.step
    assert without.amax(1).tolist() == [2, 2, 2]


def test_rows_stop_independently(toy, prompts) -> None:
    tokens, mask = prompts(7, 4, 6)
    chosen = [Blocks(3), Threshold(0.25), Prophet(2.0, 1.0, 0.5)]
    batch = decode(toy(), tokens, 12, chosen, mask=mask)
    assert batch.history.step.amax(1).unique().numel() > 1
    for i, size in enumerate((7, 4, 6)):
        alone = decode(toy(), tokens[i : i + 1, -size:], 12, chosen)
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()
        assert batch.history.step[i].tolist() == alone.history.step[0].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"early": -1}, "Prophet.early is -1, expected at least 0"),
        ({"late": float("nan")}, "Prophet.late is nan, expected at least 0"),
        ({"steps": 0}, "Prophet.steps is 0, expected at least 1"),
        ({"region": (3, 3)}, r"Prophet.region is \(3, 3\), expected \(first, last \+ 1\)"),
    ],
)
def test_bad_arguments_of_prophet(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prophet(**given)


def test_a_region_after_the_answer_is_refused(toy, run) -> None:
    with pytest.raises(ValueError, match="region begins at 8, but the answer has 8 positions"):
        run(toy(), Prophet(region=(8, 9)))


def test_rows_whose_blocks_differ_commit_as_alone(toy, prompts) -> None:
    model, sizes = toy(attention="prefix", block_size=3), (7, 4, 6, 5)
    tokens, mask = prompts(*sizes)
    cut = AdaBlock(size=4, threshold=0.05, delimiters=tuple(range(3, 20)), share=0.5)
    canvas = torch.full((4, 12), 2)
    canvas[0, :5], canvas[2, 3:9] = 9, 8
    for bar in (0.5, 1.0, 2.0):
        chosen = [Prophet(early=bar, mid=bar, late=bar), cut]
        batch = decode(model, tokens, 12, chosen, mask=mask, canvas=canvas)
        for i, size in enumerate(sizes):
            row = tokens[i : i + 1, -size:]
            alone = decode(model, row, 12, chosen, canvas=canvas[i : i + 1])
            assert batch.tokens[i, 7:].equal(alone.tokens[0, size:])
