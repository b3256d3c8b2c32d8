import json
from pathlib import Path

import pytest
import torch

from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.credit import Credit
from mmdlm.decoding.lengths.daedal import DAEDAL
from mmdlm.decoding.memory import Memory
from mmdlm.decoding.plans.ada_block import AdaBlock
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.view import View

GOLDEN = Path(__file__).parents[2] / "golden" / "decoding" / "history.json"
CASES = json.loads(GOLDEN.read_text())["methods"]["credit_trajectory"]["cases"]


def strategy(params: dict) -> Credit:
    return Credit(params["credit_alpha"], params["boost_gamma"], params["decay_beta"])


def guided(
    credit: Credit, view: View, logits: torch.Tensor, memory: Memory | None
) -> tuple[torch.Tensor, Memory]:
    """Logits with the credit of earlier steps, and what is remembered for the next one."""
    if memory is not None:
        view._state.memories[id(credit)] = memory
    return credit.guide(view, logits.clone()), view.memory(credit)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_a_block_is_committed_as_by_the_reference(case: dict, moment) -> None:
    params, credit = case["params"], strategy(case["params"])
    masked, memory = torch.ones(1, case["block_length"], dtype=torch.bool), None
    for number, step in enumerate(case["steps"]):
        logits = torch.tensor(step["logits"])[None]
        view = moment(logits, masked, credit, block_step=number)
        fused, memory = guided(credit, view, logits, memory)
        want = torch.tensor(step["fused_confidence"])
        torch.testing.assert_close(fused.softmax(-1).amax(-1)[0], want, atol=1e-4, rtol=0)
        view = moment(fused, masked)
        taken = Threshold(params["threshold"]).select(view) & masked
        if masked.any():
            taken[0, view.confidence.argmax()] = True
        assert taken[0].nonzero()[:, 0].tolist() == step["commit"]
        assert view.candidates[taken].tolist() == step["commit_tokens"]
        masked = masked & ~taken


def dense(logits: list, masked: list, credits: dict, given: Credit, softmax) -> list:
    """One row by hand: credits[position][token], one for every token."""
    fused = []
    for p, row in enumerate(logits):
        mine = credits.setdefault(p, [0.0] * len(row))
        mine[:] = [given.beta * c for c in mine]
        if masked[p]:
            best = max(range(len(row)), key=lambda v: (row[v], -v))
            mine[best] += softmax(row)[best] ** given.gamma
        bonus = [float(given.alpha * torch.tensor(c).log1p()) for c in mine]
        fused.append([z + b for z, b in zip(row, bonus, strict=True)])
    return fused


@pytest.mark.parametrize("given", [Credit(), Credit(2.0, 1.0, 1.0), Credit(1.0, 0.0, 0.0)])
def test_history_equals_a_credit_per_token(given: Credit, softmax, moment) -> None:
    generator = torch.Generator().manual_seed(2)
    memory, credits = None, [{}, {}]
    for step in range(12):
        logits = 3 * torch.randn(2, 4, 6, generator=generator)
        masked = torch.rand(2, 4, generator=generator) < 0.6
        view = moment(logits, masked, given, block_step=step)
        got, memory = guided(given, view, logits, memory)
        rows = zip(logits.tolist(), masked, credits, strict=True)
        want = [dense(*row, given, softmax) for row in rows]
        torch.testing.assert_close(got, torch.tensor(want), atol=1e-5, rtol=1e-5)


def test_a_full_history_drops_the_token_of_least_credit(moment) -> None:
    given, masked = Credit(1.0, 0.0, 0.5, slots=2), torch.ones(1, 1, dtype=torch.bool)
    memory = None
    for step, best in enumerate((0, 1, 1, 2)):
        logits = torch.zeros(1, 1, 4)
        logits[..., best] = 5.0
        got, memory = guided(given, moment(logits, masked, given, block_step=step), logits, memory)
    # Token 0, of credit 0.125, was replaced; token 1 has 1/4 + 1/2, token 2 has 1.
    want = torch.tensor([0.0, 0.75, 1.0, 0.0]).log1p()
    torch.testing.assert_close((got - logits)[0, 0], want)


def test_positions_that_close_lose_their_credit(moment) -> None:
    given, logits = Credit(), torch.eye(4)[None] * 3
    view = moment(logits, torch.ones(1, 4, dtype=torch.bool), given)
    given.guide(view, logits.clone())
    before = view.memory(given)["credit"]
    assert (before.sum(-1) > 0).all()
    view._state.block_step += 1
    view._state.opened = torch.tensor([[False, False, False, True, True]])
    view._state.focus(slice(3, 5))
    given.guide(view, logits[:, 2:].clone())
    after = view.memory(given)["credit"]
    assert (after[0].sum(-1) > 0).tolist() == [False, False, True, True]
    assert (after[0, 2:].sum(-1) > before[0, 2:].sum(-1)).all()


def test_a_new_block_starts_without_credit(moment) -> None:
    given, logits = Credit(), torch.eye(4)[None].expand(2, -1, -1) * 3
    view = moment(logits, torch.ones(2, 4, dtype=torch.bool), given)
    once = given.guide(view, logits.clone())
    view._state.block_step = torch.tensor([0, 1])  # the second row stays in its block
    twice = given.guide(view, logits.clone())
    assert twice[0].equal(once[0])
    assert (twice[1].diagonal() > once[1].diagonal()).all()


@pytest.mark.parametrize("tau", [0.2, 0.5, 0.9])
def test_credit_of_no_weight_is_no_credit(tau: float, toy, run) -> None:
    with_credit = run(toy(), Blocks(5), Credit(alpha=0), Threshold(tau))
    without = run(toy(), Blocks(5), Threshold(tau))
    assert with_credit.tokens.equal(without.tokens)
    assert with_credit.history.step.equal(without.history.step)


def test_credit_makes_a_threshold_faster(synthetic) -> None:
    model = {"seed": 3, "vocab": 12, "mask_id": 11, "scale": 6.0, "mix": 0.9}
    model |= {"eos_id": None, "eos_slope": 0.0, "shift": 0}
    prompt = torch.tensor([[4, 5, 6]])
    nfe = [
        decode(synthetic(model), prompt, 24, [*more, Threshold(0.6)]).nfe
        for more in ([], [Credit()], [Credit(2.0)])
    ]
    assert nfe == sorted(nfe, reverse=True)
    assert nfe[1] < nfe[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": -1}, "Credit.alpha is -1, expected at least 0"),
        ({"gamma": float("nan")}, "Credit.gamma is nan, expected at least 0"),
        ({"beta": 1.5}, "Credit.beta is 1.5, expected at least 0 and at most 1"),
        ({"slots": 0}, "Credit.slots is 0, expected at least 1"),
    ],
)
def test_bad_arguments_of_credit(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Credit(**given)


def test_positions_that_adablock_closes_again_gain_no_credit(toy, prompts) -> None:
    model, sizes = toy(), (7, 4, 6, 5)
    tokens, mask = prompts(*sizes)
    cut = AdaBlock(size=2, threshold=0.05, delimiters=tuple(range(3, 20)), share=0.3)
    chosen = [cut, Credit(alpha=5.0, beta=1.0)]
    batch = decode(model, tokens, 12, chosen, mask=mask)
    for i, size in enumerate(sizes):
        alone = decode(model, tokens[i : i + 1, -size:], 12, chosen)
        assert batch.tokens[i, 7:].equal(alone.tokens[0, size:])
        assert batch.history.confidence[i].allclose(alone.history.confidence[0], atol=1e-4)


def test_a_row_beside_one_that_grows_keeps_its_credit(toy, prompts) -> None:
    model, strategies = toy(), [DAEDAL(growth=3.0, expansion=2, check=2), Credit(alpha=2.0)]
    grown = 0
    tokens, mask = prompts(7, 5, 3)
    both = decode(model, tokens, 6, strategies, mask=mask)
    for i, size in enumerate((7, 5, 3)):
        alone = decode(model, tokens[i : i + 1, -size:], 6, strategies)
        answer = alone.tokens[0, size:]
        assert both.tokens[i, 7 : 7 + len(answer)].equal(answer)
        assert both.history.confidence[i, : len(answer)].allclose(
            alone.history.confidence[0], atol=1e-4
        )
        grown += len(answer) > 6
    assert grown
