"""FreeDave: the drafts of the reference, and the answer of a plain decode."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import mmdlm
from mmdlm.backbones.kv import Rows, take
from mmdlm.data.scenes import draw, random_scene
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.numerics import log_odds
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.left_to_right import LeftToRight
from mmdlm.decoding.strategy import Strategy
from mmdlm.layout import Row, Sequence, arrange
from mmdlm.model import MultimodalDLM
from mmdlm.speculative.free_dave import Guess, free_dave, nested, verify

FILE = Path(__file__).parents[1] / "golden" / "decoding" / "speculative.json"
METHODS = {name: m["cases"] for name, m in json.loads(FILE.read_text())["methods"].items()}
LENGTH, MASK = 8, 2
MODELS = {
    "full": {},
    "full shifted": {"shift": True},
    "prefix": {"attention": "prefix"},
    "prefix shifted": {"attention": "prefix", "shift": True},
    "cascade in blocks": {"attention": "cascade", "block_size": 4},
    "block causal": {"attention": "block_causal", "block_size": 4},
    "autoregressive": {"attention": "block_causal", "block_size": 1, "shift": True},
}
Toy = Callable[..., MultimodalDLM]


def each(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", METHODS[name], ids=range(len(METHODS[name])))


@each("freedave_draft")
def test_drafts_are_those_of_the_reference(case: dict) -> None:
    params, logits = case["params"], torch.tensor(case["logits"])
    tokens = torch.tensor(case["tokens"])
    picked = logits.argmax(-1)
    odds = log_odds(logits[None], picked[None])[0]
    masked = (tokens == params["mask_id"]).nonzero()[:, 0]
    order = masked[odds[masked].sort(descending=True, stable=True).indices]
    if params["order"] == "left_to_right":
        order = masked
    got = nested(tokens, Guess(picked, odds, odds), order, range(1, params["draft_steps"] + 1))
    assert got.tolist() == case["output"]


@each("freedave_verify")
def test_the_accepted_draft_is_that_of_the_reference(case: dict) -> None:
    params = case["params"]
    drafts, targets = torch.tensor(case["drafts"]), torch.tensor(case["targets"])
    path = verify(drafts, targets, params["match_rule"], params["mask_id"])
    assert path[-1] == case["output"]
    assert path == sorted(set(path))


def assert_same(got: Decoded, row: int, plain: Decoded) -> None:
    """Row of a batch: tokens, order and confidence of a plain decode of that row alone."""
    size = plain.history.step.shape[1]
    assert got.tokens[row, -size:].tolist() == plain.tokens[0, -size:].tolist()
    assert got.history.step[row].tolist() == plain.history.step[0].tolist()
    torch.testing.assert_close(
        got.history.confidence[row], plain.history.confidence[0], atol=1e-4, rtol=1e-3
    )


def compare(
    model: MultimodalDLM, seed: int, prompts: Callable, plain: list[Strategy], **given: object
) -> tuple[int, int]:
    """A batch of three rows against plain decodes; forwards of both."""
    sizes = [(7, 4, 6), (5, 5, 2), (1, 8, 3)][seed % 3]
    tokens, mask = prompts(seed, *sizes)
    generator = torch.Generator().manual_seed(seed)
    canvas = torch.full((3, LENGTH), MASK)
    known = torch.rand(canvas.shape, generator=generator) < 0.2 * (seed % 2)
    canvas[known] = 17
    got = free_dave(model, tokens, LENGTH, mask=mask, canvas=canvas, **given)
    forwards = []
    for i, size in enumerate(sizes):
        alone = decode(model, tokens[i : i + 1, -size:], LENGTH, plain, canvas=canvas[i : i + 1])
        assert_same(got, i, alone)
        forwards.append(alone.nfe)
    assert got.tokens[:, :-LENGTH].tolist() == tokens.tolist()
    assert got.nfe <= max(forwards)
    return got.nfe, max(forwards)


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_and_order_are_those_of_a_plain_decode(kind: str, toy: Toy, prompts) -> None:
    spent, plainly = 0, 0
    for seed in range(8):
        block, drafts = (None, 1, 3, 5, 8)[seed % 5], (4, 1, 2, 7)[seed % 4]
        model = toy(seed % 4, **MODELS[kind])
        ours, theirs = compare(model, seed, prompts, [Blocks(block)], block=block, drafts=drafts)
        spent, plainly = spent + ours, plainly + theirs
    assert spent < plainly


@pytest.mark.parametrize("kind", MODELS)
def test_with_a_threshold_it_is_a_decode_with_that_threshold(kind: str, toy: Toy, prompts) -> None:
    spent, plainly = 0, 0
    for seed in range(8):
        block, tau = (None, 4, 3)[seed % 3], (0.1, 0.3, 1.5, 0.0)[seed % 4]
        model = toy(seed % 5, **MODELS[kind])
        plain = [Blocks(block), Threshold(tau)]
        ours, theirs = compare(model, seed, prompts, plain, block=block, tau=tau)
        spent, plainly = spent + ours, plainly + theirs
    assert spent < plainly


def test_reading_order(toy: Toy, prompts) -> None:
    for seed in range(6):
        plain = [Blocks(4), LeftToRight()]
        given = {"block": 4, "order": "left_to_right"}
        ours, theirs = compare(toy(seed), seed, prompts, plain, **given)
        assert ours <= theirs


def test_both_rules_are_one_without_a_threshold(toy: Toy, prompts) -> None:
    tokens, mask = prompts(0, 7, 4)
    one, two = (
        free_dave(toy(), tokens, LENGTH, mask=mask, rule=rule) for rule in ("exact_match", "subset")
    )
    assert one.tokens.equal(two.tokens)
    assert one.nfe == two.nfe


def test_subsets_with_a_threshold_fill_the_answer(toy: Toy, prompts) -> None:
    tokens, mask = prompts(1, 7, 4)
    for tau in (0.0, 0.2, 0.9):
        got = free_dave(toy(), tokens, LENGTH, mask=mask, tau=tau, rule="subset")
        assert not (got.tokens[:, -LENGTH:] == MASK).any()
        assert got.history.step.min() == 0


class Sure:
    """A model whose answer to a position does not depend on the other positions."""

    device = torch.device("cpu")
    backbone = torch.nn.Module()  # without weights

    def __init__(self, vocab: int = 30) -> None:
        self.table = 5 * torch.randn(64, vocab, generator=torch.Generator().manual_seed(0))
        self.forwards: list[tuple[int, int]] = []
        self.spec = SimpleNamespace(
            mask_id=MASK,
            eos_id=1,
            stop_ids=(),
            shift=False,
            attention="full",
            block_size=None,
            context=None,
            transformer=SimpleNamespace(vocab=vocab),
        )

    def run(
        self, sequence: Sequence, rows: Rows, read: Rows, kv: None, columns: None, mask: str = ""
    ) -> Tensor:
        logits = self.table[take(sequence.positions, read)]
        self.forwards.append(tuple(logits.shape[:2]))
        return logits


@pytest.mark.parametrize(("drafts", "forwards"), [(1, 24), (2, 13), (4, 7), (8, 4), (24, 2)])
def test_sure_drafts_are_all_accepted(drafts: int, forwards: int) -> None:
    model, prompt = Sure(), torch.tensor([[3, 4]])
    plain = decode(model, prompt, 24, [Blocks(8)])
    model.forwards.clear()
    got = free_dave(model, prompt, 24, drafts=drafts, block=8)
    assert (plain.nfe, got.nfe) == (24, forwards)
    assert got.nfe == len(model.forwards)
    assert_same(got, 0, plain)
    assert max(rows for rows, _ in model.forwards) <= drafts
    if drafts < 8:
        assert max(read for _, read in model.forwards) <= 16  # the head is run on two blocks only


def test_rows_of_a_batch_share_forwards() -> None:
    model = Sure()
    tokens = torch.tensor([[3, 4], [5, 6], [7, 8]])
    canvas = torch.full((3, 12), MASK)
    canvas[1, :6], canvas[2] = 9, 9
    got = free_dave(model, tokens, 12, canvas=canvas)
    assert got.nfe == 1 + 3
    # The first forward holds each row that has masks once, the others up to four drafts of it.
    assert [rows for rows, _ in model.forwards] == [2, 8, 5, 3]
    assert got.history.step[2].tolist() == [-1] * 12


def test_nothing_to_fill_costs_nothing() -> None:
    model = Sure()
    got = free_dave(model, torch.tensor([[3]]), 2, canvas=torch.tensor([[7, 8]]))
    assert (got.tokens.tolist(), got.nfe, model.forwards) == ([[3, 7, 8]], 0, [])


def test_media_stand_in_every_draft(toy: Toy) -> None:
    model = toy(1)
    generator = torch.Generator().manual_seed(1)
    rows = [
        Row((torch.randn(n, 32, generator=generator), torch.randint(3, 50, (4,))))
        for n in (3, 6, 2)
    ]
    got = free_dave(model, arrange(rows, pad=0), LENGTH, block=4)
    for i, row in enumerate(rows):
        assert_same(got, i, decode(model, arrange([row], pad=0), LENGTH, [Blocks(4)]))


def test_the_bundled_model_captions_in_fewer_forwards() -> None:
    model, rng = mmdlm.load("tiny"), np.random.default_rng(1)
    text = model.prompt("describe the picture")
    rows = []
    for shapes in (1, 3):
        image = model.processor.prepare("image", draw(random_scene(rng, shapes)))
        rows.append(Row((*model.encode("image", [image]), text)))
    prompt = model.arrange(rows)
    plain, got = decode(model, prompt, 20), free_dave(model, prompt, 20)
    assert got.tokens.equal(plain.tokens)
    assert got.history.step.equal(plain.history.step)
    assert plain.nfe == 20
    assert got.nfe <= 10


def test_columns_bound_drafts(toy: Toy, prompts) -> None:
    tokens, mask = prompts(2, 5, 3)
    for columns in (slice(20, 30), slice(0, 4), slice(None, -30)):
        got = free_dave(toy(), tokens, LENGTH, mask=mask, columns=columns)
        plain = decode(toy(), tokens, LENGTH, mask=mask, columns=columns)
        assert got.tokens.equal(plain.tokens)


def test_a_mask_in_the_prompt_stays(toy: Toy) -> None:
    prompt = torch.tensor([[3, MASK, 4]])
    got = free_dave(toy(), prompt, LENGTH)
    assert got.tokens[:, :3].equal(prompt)
    assert got.tokens.equal(decode(toy(), prompt, LENGTH).tokens)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"drafts": 0}, "drafts is 0, expected at least 1"),
        ({"block": 0}, "block is 0, expected at least 1"),
        ({"tau": float("nan")}, "tau is nan, expected a probability"),
        ({"rule": "superset"}, "rule is 'superset', expected one of exact_match, subset"),
        ({"order": "random"}, "order is 'random', expected one of confidence, left_to_right"),
        ({"length": 0}, "length is 0"),
    ],
)
def test_bad_arguments_of_free_dave_are_named(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        free_dave(Sure(), torch.tensor([[3]]), **{"length": 2, **given})


def test_nan_is_not_drafted() -> None:
    model = Sure()
    model.table *= float("nan")
    with pytest.raises(ValueError, match="no possible token: the model gave NaN"):
        free_dave(model, torch.tensor([[3]]), 2)


@pytest.mark.parametrize("kind", ["prefix", "prefix shifted", "cascade in blocks", "full"])
def test_a_prompt_that_does_not_see_the_answer_is_computed_once(
    kind: str, toy: Toy, prompts, monkeypatch
) -> None:
    model, (tokens, mask) = toy(**MODELS[kind]), prompts(0, 7, 4, 6)
    starts, inner = [], model.run

    def run(sequence: Sequence, rows: slice, *given: object) -> Tensor:
        starts.append(rows.start)
        return inner(sequence, rows, *given)

    monkeypatch.setattr(model, "run", run)
    got = free_dave(model, tokens, LENGTH, mask=mask)
    assert len(starts) == got.nfe > 2
    kept = 0 if kind == "full" else 7 - int(model.spec.shift)
    assert starts == [0] + [kept] * (got.nfe - 1)


def test_an_empty_prompt_gives_the_answer_alone(golden) -> None:
    model = mmdlm.load(golden / "backbones" / "llada", device="cpu")
    canvas = torch.tensor([[7, *[model.spec.mask_id] * 5]])
    empty = torch.zeros(1, 0, dtype=torch.long)
    found = free_dave(model, empty, 6, canvas=canvas)
    assert found.tokens.equal(decode(model, empty, 6, canvas=canvas).tokens)
