"""Log likelihood of answers: published values, every kind of attention, batches, and errors."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import mmdlm
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.layout import Row, Turn, arrange
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.mask_plans import Plan, exact, gauss_legendre
from mmdlm.tasks.likelihood import Likelihood, Part, likelihood, score

PROMPT, ANSWER = torch.tensor([5, 6, 7]), torch.tensor([8, 3, 9, 4, 8, 10])
DRAWN = ["monte_carlo", "stratified", "complementary", "quadrature"]


def small(**spec) -> MultimodalDLM:
    config = TransformerConfig(vocab=13, width=16, layers=2, heads=2, inner=24)
    ids = {"mask_id": 12, "eos_id": 1, "pad_id": 0}
    model = MultimodalDLM(Spec("mmdlm", config, **ids | spec)).eval()
    model.backbone.reset(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in model.backbone.parameters():
            weight.mul_(3.0)  # far from uniform
    return model


class Table:
    """The network of the golden values: h = table[id, position], logits = h + mean of h."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.device = table, torch.device("cpu")
        self.spec = SimpleNamespace(mask_id=12)
        self.backbone = SimpleNamespace(head=lambda hidden: hidden)

    def hidden_at(self, sequence, at: Tensor) -> Tensor:
        h = self.table[sequence.tokens, torch.arange(sequence.tokens.shape[1])]
        return (h + h.mean(1, keepdim=True))[at]


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "objectives" / "likelihood.json").read_text())["cases"]


@pytest.fixture(scope="module")
def table(cases):
    entry = cases["likelihood.value.cfg0.0"]["inputs"]["table"]
    return Table(torch.tensor(entry["data"]).reshape(entry["shape"]))


def values(entry) -> Tensor:
    return torch.tensor(entry["data"]).reshape(entry["shape"])


def on_table(cases, table, plan: Plan, cfg: float = 0.0) -> Likelihood:
    given = cases["likelihood.exact_elbo"]["inputs"]
    prompt, answer = values(given["prompt"]), values(given["answer"])
    sequence = arrange([Row((), (Turn(prompt, answer),))], pad=0)
    columns = len(prompt) + torch.arange(len(answer))
    return score(table, sequence, [Part(0, columns, plan, "given")], cfg, 5)[0]


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_equals_the_published_value_for_its_masks(scale, cases, table):
    case = cases[f"likelihood.value.cfg{scale}"]
    inputs = torch.cat([values(one) for one in case["inputs"]["network_inputs"]])
    inputs = inputs[(inputs[:, :3] != 12).all(1)]  # without those of the guidance
    masks = inputs[:, 3:] == 12
    assert len(masks) == case["params"]["mc_num"]
    unit = torch.arange(len(masks)) // case["params"]["batch_size"]
    plan = Plan(masks, 6 / masks.sum(1).double() / len(masks), unit, 0 * unit)
    found = on_table(cases, table, plan, scale)
    assert found.bound == pytest.approx(case["outputs"]["log_likelihood"], rel=1e-6)


def test_enumeration_equals_the_recorded_bound(cases, table):
    found = on_table(cases, table, exact(6))
    assert found.bound == pytest.approx(cases["likelihood.exact_elbo"]["outputs"]["elbo"], rel=1e-6)
    assert found.standard_error == 0.0
    assert (found.tokens, found.forwards) == (6, 63)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 8])
def test_quadrature_equals_the_recorded_values(nodes, cases, table):
    want = cases["likelihood.quadrature_exact_inner"]["outputs"]["elbo_by_nodes"][str(nodes)]
    masks = exact(6).masks
    size = masks.sum(1, keepdim=True).double()
    t, w = gauss_legendre(nodes)
    weights = (w / t * t**size * (1 - t) ** (6 - size)).sum(1)
    none = torch.full((len(masks),), -1)
    found = on_table(cases, table, Plan(masks, weights, none, none))
    assert found.bound == pytest.approx(want, rel=1e-6)


def by_loops(model: MultimodalDLM, prompt: Tensor, answer: Tensor, size: int) -> float:
    """The bound by blocks of `size` tokens, counted from the start of the answer."""
    total = 0.0
    for start in range(0, len(answer), size):
        block = range(start, min(start + size, len(answer)))
        for k in range(1, len(block) + 1):
            losses = []
            for masked in itertools.combinations(block, k):
                tokens = torch.cat([prompt, answer[: block[-1] + 1]])
                at = len(prompt) + torch.tensor(masked)
                tokens[at] = 12
                logits = model.logits(tokens[None])[0].log_softmax(-1)
                losses.append(-logits[at, answer[list(masked)]].sum().item())
            total -= np.mean(losses) / k
    return total


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("attention", "size"), [("full", 6), ("block_causal", 3)])
def test_equals_plain_loops_for_every_attention(attention, size, shift):
    spec = {"block_size": size} if attention == "block_causal" else {}
    model = small(attention=attention, shift=shift, **spec)
    found = likelihood(model, PROMPT, ANSWER, details=True)
    with torch.no_grad():
        want = by_loops(model, PROMPT, ANSWER, size)
    assert found.bound == pytest.approx(want, rel=1e-5)
    assert (found.method, found.standard_error) == ("exact", 0.0)
    assert found.forwards == sum(2**size - 1 for _ in range(6 // size))
    assert found.perplexity == pytest.approx(math.exp(-want / 6), rel=1e-5)


def test_blocks_of_one_token_give_the_chain_rule():
    model = small(attention="block_causal", block_size=1, shift=True)
    tokens = torch.cat([PROMPT, ANSWER])
    with torch.no_grad():
        logits = model.logits(tokens[None])[0].log_softmax(-1)
    want = logits[3:].gather(1, ANSWER[:, None]).sum().item()
    found = likelihood(model, PROMPT, ANSWER, details=True)
    assert found.bound == pytest.approx(want, rel=1e-5)
    assert found.forwards == len(ANSWER)


@pytest.mark.parametrize("method", DRAWN)
def test_draws_converge_to_the_exact_bound_within_their_standard_error(method):
    model = small()
    want = likelihood(model, PROMPT, ANSWER)
    found = likelihood(model, PROMPT, ANSWER, method=method, samples=960, details=True)
    assert 0 < found.standard_error < 0.05 * abs(want)
    assert abs(found.bound - want) < 3.5 * found.standard_error
    assert found.forwards <= 63  # equal masks are computed once


def test_one_token_takes_one_forward():
    found = likelihood(small(), PROMPT, ANSWER[:1], method="monte_carlo", details=True)
    assert found.forwards == 1
    assert found.bound == pytest.approx(likelihood(small(), PROMPT, ANSWER[:1]), rel=1e-6)


def test_a_draw_without_masks_needs_no_forward():
    model, run = small(), {"method": "quadrature", "samples": 3, "details": True}
    found = [likelihood(model, PROMPT, ANSWER[:1], seed=seed, **run) for seed in range(80)]
    assert {(one.forwards, one.bound < 0) for one in found} == {(0, False), (1, True)}


def test_a_batch_equals_its_rows_alone():
    model = small(attention="block_causal", block_size=4)
    answers = [ANSWER, ANSWER[:2], ANSWER.flip(0)]
    prompts = [PROMPT, PROMPT[:1], PROMPT.repeat(3)]
    together = likelihood(model, [p.tolist() for p in prompts], answers, batch_size=7)
    alone = [likelihood(model, p, a, batch_size=2) for p, a in zip(prompts, answers, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5)


def test_the_seed_fixes_the_masks():
    model = small()
    run = {"method": "stratified", "samples": 12}
    assert likelihood(model, PROMPT, ANSWER, **run) == likelihood(model, PROMPT, ANSWER, **run)
    assert likelihood(model, PROMPT, ANSWER, seed=1, **run) != likelihood(
        model, PROMPT, ANSWER, **run
    )


def test_texts_conversations_and_images(build):
    model = build()
    image = np.zeros((32, 32, 3), np.uint8)
    other = np.full((32, 32, 3), 255, np.uint8)

    def asked(item):
        parts = [{"type": "image", "image": item}, {"type": "text", "text": "describe the picture"}]
        return [{"role": "user", "content": parts}]

    several = likelihood(model, [asked(image), asked(other)], ["a red circle", "a red circle"])
    assert several[0] == pytest.approx(likelihood(model, asked(image), "a red circle"), rel=1e-5)
    assert several[0] != pytest.approx(several[1], rel=1e-5)
    ids = model.tokenizer.encode("a red circle")
    assert likelihood(model, asked(image), ids) == pytest.approx(several[0], rel=1e-5)


def test_one_prompt_ranks_several_answers(build):
    model = build()
    ranked = likelihood(model, "what colour is the circle ?", ["red", "blue", "green"])
    alone = [likelihood(model, "what colour is the circle ?", a) for a in ("red", "blue", "green")]
    assert ranked == pytest.approx(alone, rel=1e-5)


def test_a_canvas_scores_its_end_tokens(build):
    model = build()
    found = likelihood(model, "what colour is the circle ?", "red", length=4, details=True)
    ids = [*model.tokenizer.encode("red"), *[model.spec.eos_id] * 3]
    assert found.tokens == 4
    assert found.bound == pytest.approx(
        likelihood(model, "what colour is the circle ?", ids), rel=1e-5
    )


def test_white_space_moves_from_prompt_to_answer(speller):
    model = speller()
    moved = likelihood(model, "the cat ", "sat", chat=False, details=True)
    assert moved == likelihood(model, "the cat", " sat", chat=False, details=True)
    assert moved.tokens == 4


def test_guidance_without_strength_changes_nothing():
    model = small()
    plain = likelihood(model, PROMPT, ANSWER)
    assert likelihood(model, PROMPT, ANSWER, cfg=1e-9) == pytest.approx(plain, rel=1e-5)
    assert likelihood(model, PROMPT, ANSWER, cfg=1.0) != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize(
    ("prompt", "answer", "options", "error"),
    [
        (PROMPT, torch.tensor([], dtype=torch.long), {}, r"answer has shape \[0\]"),
        (PROMPT, torch.tensor([3, 12]), {}, "answer holds the mask id 12"),
        (PROMPT, torch.tensor([3, 99]), {}, "holds the id 99"),
        (PROMPT, ANSWER, {"method": "mc"}, "method is 'mc', expected one of exact"),
        (PROMPT, ANSWER, {"length": 8}, "length pads text answers"),
        (PROMPT, ANSWER, {"samples": 0}, "samples is 0"),
        (PROMPT, ANSWER.repeat(4), {"method": "exact"}, "exact enumeration of 24 tokens"),
        ([[5], [6]], [ANSWER] * 3, {}, "got 2 prompts and 3 answers"),
        (PROMPT[None], ANSWER, {}, r"prompt has shape \[1, 3\]"),
    ],
)
def test_wrong_arguments_are_named(prompt, answer, options, error):
    with pytest.raises(ValueError, match=error):
        likelihood(small(), prompt, answer, **options)


def test_the_public_name_is_this_function():
    assert mmdlm.likelihood is likelihood
