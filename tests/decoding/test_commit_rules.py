"""Single decisions and rollouts of published commit rules, equal to the reference functions."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.commits.cad import CAD
from mmdlm.decoding.commits.entropy_threshold import EntropyThreshold
from mmdlm.decoding.commits.hierarchy import Hierarchy
from mmdlm.decoding.commits.local_leap import LocalLeap
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.revise.hierarchy_remask import HierarchyRemask
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View

FILE = Path(__file__).parents[1] / "golden" / "decoding" / "commit_rules.json"
METHODS = {name: m["cases"] for name, m in json.loads(FILE.read_text())["methods"].items()}


def each(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", METHODS[name], ids=range(len(METHODS[name])))


def given(case: dict) -> tuple[Tensor, Tensor]:
    """Logits [1 L V] and masked [1 L] of a single decision."""
    logits = torch.tensor(case["logits"])[None]
    masked = torch.zeros(logits.shape[:2], dtype=torch.bool)
    masked[0, case["masked"]] = True
    return logits, masked


def decided(view: View, strategy: Strategy, logits: Tensor) -> Tensor:
    """[B R] bool, the positions that the loop would commit."""
    if "score" in strategy.hooks():
        score = strategy.score(view, logits, view.candidates)
        view._state.confidence = score.masked_fill(~view.open, -torch.inf)
    taken = strategy.select(view)
    if not strategy.may_idle:
        taken = taken.scatter(1, view.confidence.argmax(1, keepdim=True), True)
    return taken & view.open


def check(case: dict, strategy: Strategy, moment) -> None:
    logits, masked = given(case)
    view = moment(logits, masked, strategy)
    taken = decided(view, strategy, logits)
    assert taken[0].nonzero()[:, 0].tolist() == case["commit"]
    assert view.candidates[taken].tolist() == case["commit_tokens"]


@each("commit_entropy")
def test_entropy_threshold_is_that_of_dparallel(case: dict, moment) -> None:
    check(case, EntropyThreshold(case["params"]["entropy_threshold"]), moment)


@each("commit_localleap")
def test_local_leap_is_that_of_its_authors(case: dict, moment) -> None:
    params = case["params"]
    rule = LocalLeap(params["threshold"], params["relaxed_threshold"], params["radius"])
    check(case, rule, moment)


@pytest.mark.parametrize("name", ["commit_hierarchy", "commit_hierarchy_v2"])
def test_hierarchy_is_both_versions_of_dinfer(name: str, moment) -> None:
    for case in METHODS[name]:
        params = case["params"]
        check(case, Hierarchy(params["threshold"], params["low_threshold"]), moment)


@each("hierarchy_remask")
def test_hierarchy_with_remasking_is_that_of_dinfer(case: dict, moment) -> None:
    params = case["params"]
    logits, masked = given(case)
    limits = (params[f"{n}threshold"] for n in ("", "low_", "remask_"))
    rule = HierarchyRemask(*limits)
    view = moment(logits, masked, rule)
    view._state.writable = view.answer
    taken = decided(view, rule, logits) | rule.edit(view)
    again = rule.revise(view)[:, 1:]
    assert again[0].nonzero()[:, 0].tolist() == case["remask"]
    assert (taken | again)[0].nonzero()[:, 0].tolist() == case["commit"]
    tokens = view.candidates.masked_fill(again, params["mask_id"])
    assert tokens[taken | again].tolist() == case["commit_tokens"]


@each("commit_dinfer_threshold")
def test_threshold_is_that_of_dinfer(case: dict, moment) -> None:
    logits, masked = given(case)
    # It skips positions where the mask id is the best; our loop takes the next best there.
    masked &= logits.argmax(-1) != case["params"]["mask_id"]
    view = moment(logits, masked)
    taken = decided(view, Threshold(case["params"]["threshold"]), logits)
    assert taken[0].nonzero()[:, 0].tolist() == case["commit"]
    assert view.candidates[taken].tolist() == case["commit_tokens"]


@each("cad_generate")
def test_rollout_is_that_of_cd4lm(case: dict, synthetic) -> None:
    params, output = case["params"], case["output"]
    least, most = (params[f"{n}_tokens_per_step"] for n in ("min", "max"))
    rule = CAD(
        params["confidence_threshold"],
        least,
        most,
        params["selection_method"],
        nats=-params["entropy_threshold"],
        eos_share=0,  # the end tokens of the reference are outside of this vocabulary
    )
    prompt = torch.tensor([case["prompt"]])
    strategies = [Blocks(params["block_length"]), rule]
    got = decode(synthetic(case["model"]), prompt, params["gen_length"], strategies)
    assert got.tokens.tolist() == [output["sequence"]]
    assert got.nfe == output["nfe"]
    step = got.history.step[0]
    for i, commits in enumerate(output["commits"]):
        assert (len(case["prompt"]) + (step == i).nonzero()[:, 0]).tolist() == commits
