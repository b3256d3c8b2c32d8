"""Single decisions and rollouts, equal to the reference functions."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.commits.factor import Factor
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.guidance.nucleus import Nucleus
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.entropy import Entropy
from mmdlm.decoding.scores.margin import Margin
from mmdlm.decoding.scores.probability import Probability

FILE = Path(__file__).parents[1] / "golden" / "decoding" / "methods.json"
METHODS = {name: m["cases"] for name, m in json.loads(FILE.read_text())["methods"].items()}


def each(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", METHODS[name], ids=range(len(METHODS[name])))


def filled(got: Decoded, prompt: int, step: int) -> list[int]:
    """Canvas positions a step committed."""
    return (prompt + (got.history.step[0] == step).nonzero()[:, 0]).tolist()


def commits(case: dict) -> tuple[Tensor, Tensor]:
    """Logits [1 L V] and masked [1 L] of a single decision."""
    logits = torch.tensor(case["logits"])[None]
    masked = torch.zeros(logits.shape[:2], dtype=torch.bool)
    masked[0, case["masked"]] = True
    return logits, masked


@each("schedule_uniform")
def test_top_k_commits_the_scheduled_number(case: dict, moment) -> None:
    masked, steps = case["params"]["masked"], case["params"]["steps"]
    left = torch.ones(1, masked, dtype=torch.bool)
    for step, quota in enumerate(case["output"][:masked]):
        state = moment(
            torch.randn(1, masked, 4), left, block_step=step, block_masks=torch.tensor([masked])
        )
        if quota and left.any():
            assert int((TopK(steps).select(state) & left).sum()) == quota
        left = left & ~TopK(steps).select(state)


@each("commit_topk")
def test_top_k_commits_what_the_reference_commits(case: dict, moment) -> None:
    logits, masked = commits(case)
    k = case["params"]["k"]
    # k now and k in the next step: a block of 2 k masks in two steps.
    state = moment(logits, masked, block_masks=torch.tensor([2 * k]))
    taken = TopK(2).select(state) & masked
    assert taken[0].nonzero()[:, 0].tolist() == case["commit"]
    assert state.candidates[taken].tolist() == case["commit_tokens"]


@each("commit_threshold")
def test_threshold_commits_what_the_reference_commits(case: dict, moment) -> None:
    logits, masked = commits(case)
    state = moment(logits, masked)
    taken = Threshold(case["params"]["threshold"]).select(state) & masked
    taken[0, state.confidence.argmax()] = True
    assert taken[0].nonzero()[:, 0].tolist() == case["commit"]
    assert state.candidates[taken].tolist() == case["commit_tokens"]


@each("commit_factor")
def test_factor_commits_what_the_reference_commits(case: dict, moment) -> None:
    logits, masked = commits(case)
    state = moment(logits, masked)
    taken = Factor(case["params"]["factor"]).select(state) & masked
    assert taken[0].nonzero()[:, 0].tolist() == case["commit"]
    assert state.candidates[taken].tolist() == case["commit_tokens"]


@each("confidence_kinds")
def test_confidence_is_that_of_the_reference(case: dict, moment) -> None:
    params = case["params"]
    logits = torch.tensor(case["logits"])[None]
    state = moment(logits, torch.ones(logits.shape[:2], dtype=torch.bool))
    logits = Nucleus(params["top_p"] or 1.0, params["top_k"]).guide(state, logits)
    state = moment(logits, torch.ones(logits.shape[:2], dtype=torch.bool))
    kind = {"maskgit_plus": Probability, "topk_margin": Margin, "entropy": Entropy}[params["alg"]]
    score = kind().score(state, logits, state.candidates)
    if kind is Probability:
        score = score.sigmoid()
    if kind is Margin:
        score = score + 1
    torch.testing.assert_close(score[0], torch.tensor(case["confidence"]), atol=1e-4, rtol=0)
    assert state.candidates[0].tolist() == case["tokens"]


@each("fastdllm_generate")
def test_rollout_is_that_of_fast_dllm(case: dict, synthetic) -> None:
    params, output = case["params"], case["output"]
    select = Threshold(params["threshold"]) if params["threshold"] else TopK(params["steps"])
    strategies = [Blocks(params["block_length"]), select]
    prompt = torch.tensor([case["prompt"]])
    got = decode(synthetic(case["model"]), prompt, params["gen_length"], strategies)
    assert got.tokens.tolist() == [output["sequence"]]
    assert got.nfe == output["nfe"]
    steps = range(len(output["commits"]))
    assert [filled(got, len(case["prompt"]), i) for i in steps] == output["commits"]


@each("llada_generate_cfg")
def test_rollout_with_guidance_is_that_of_llada(case: dict, synthetic) -> None:
    params, output = case["params"], case["output"]
    strategies = [Blocks(params["block_length"]), TopK(params["steps"]), CFG(params["cfg_scale"])]
    prompt = torch.tensor([case["prompt"]])
    got = decode(synthetic(case["model"]), prompt, params["gen_length"], strategies)
    assert got.tokens.tolist() == [output["sequence"]]
    steps = range(len(output["commits"]))
    assert [filled(got, len(case["prompt"]), i) for i in steps] == output["commits"]
    assert got.nfe == len(steps) * (2 if params["cfg_scale"] else 1)
