"""A packed batch has the masks and the loss of its conversations apart."""

import pytest
import torch

from adapters.mlp import MLP
from encoders.features import Prepared
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.data.collate import Collated, batch
from mmdlm.layout import Row, Turn
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.block_diffusion import BlockDiffusion
from mmdlm.objectives.complementary import Complementary
from mmdlm.objectives.dparallel import DParallel
from mmdlm.objectives.draw import Draw
from mmdlm.objectives.dscd import DSCD
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.next_token import NextToken
from mmdlm.objectives.packing import bins
from mmdlm.processor import Packed

SIZES = ((5, 6), (2, 3), (7, 2), (0, 4), (3, 9), (1, 1))
"""Tokens of each prompt and answer."""


def model_of(attention="full", block_size=None, shift=False):
    torch.manual_seed(0)
    config = TransformerConfig(vocab=20, width=16, layers=2, heads=2, inner=32)
    spec = Spec("mmdlm", config, 2, 1, 0, shift=shift, attention=attention, block_size=block_size)
    model = MultimodalDLM(spec, {"image": ViT.tiny()}, {"image": MLP(32, 16)})
    for weight in model.backbone.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def rows_of(media=False, shared=False):
    stream = torch.Generator().manual_seed(1)
    rows = []
    for i, (prompt, answer) in enumerate(SIZES):
        ids = torch.randint(3, 20, (prompt + answer,), generator=stream)
        ids[-1] = 1
        question = (ids[:prompt],) if prompt else ()
        image = (Prepared("image", torch.rand(1, 3, 16, 16, generator=stream), (16, 16)),)
        before = image if media and i % 2 else ()
        rows.append(Row((), (Turn((*before, *question), ids[prompt:]),)))
    if shared:  # two questions about one image
        first, second = (row.turns[0] for row in rows[:2])
        rows.append(Row(image, (first, second)))
    return rows


def batches(model, rows, row_tokens):
    """The batch with one conversation per row, and packed."""
    n = len(rows)
    packed = Packed(tuple(rows), tuple(range(n)), (0,) * n)
    seeds, phase = torch.arange(n) + 3, torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    return [
        batch(model, Collated(packed, seeds, phase, ("",) * n, (), limit))
        for limit in (None, row_tokens)
    ]


OBJECTIVES = {
    "masked": (Masked(), {}),
    "row": (Masked(normaliser="row"), {}),
    "rows": (Masked(normaliser="rows", weight="linear"), {}),
    "length": (Masked(normaliser="length", weight="schedule"), {}),
    "masked tokens": (Masked("one", "masked", full=0.4), {}),
    "cart": (Masked("cart"), {}),
    "cart_shifted": (Masked("cart_shifted"), {"shift": True}),
    "path": (Masked("path"), {}),
    "no mask token": (Masked(exclude_mask=True), {}),
    "ends": (Masked(ends="first"), {}),
    "exact": (Masked(draw=Draw(count="exact", per="row")), {}),
    "at least one": (Masked(draw=Draw(at_least_one=True, spread="independent")), {}),
    "stratified": (Masked(draw=Draw(spread="stratified")), {}),
    "shift": (Masked(), {"shift": True}),
    "prefix": (Masked(), {"attention": "prefix"}),
    "complementary": (Complementary(), {}),
    "complementary row": (Complementary(Masked(normaliser="row")), {}),
    "dparallel": (DParallel(block_size=3), {}),
    "dscd": (DSCD(), {}),
    "blocks": (BlockDiffusion(), {"attention": "block_causal", "block_size": 3}),
    "blocks per row": (
        BlockDiffusion(Masked(normaliser="row", draw=Draw(per="block"))),
        {"attention": "block_causal", "block_size": 3, "shift": True},
    ),
    "both": (
        Complementary(BlockDiffusion(Masked("one", "masked"))),
        {"attention": "block_causal", "block_size": 4},
    ),
    "next token": (NextToken(), {"attention": "prefix", "block_size": 1, "shift": True}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("media", [False, True])
def test_the_loss_is_that_of_the_conversations_apart(name, media):
    objective, settings = OBJECTIVES[name]
    model = model_of(**settings)
    apart, packed = batches(model, rows_of(media), 22)
    assert len(packed.sequence.tokens) < len(apart.sequence.tokens)
    gradients = []
    for each in (apart, packed):
        losses = objective.step(model, each)
        losses.mean().backward()
        gradients.append(model.backbone.embed.weight.grad.clone())
        model.zero_grad()
        gradients.append(losses)
    want, one, found, two = gradients
    torch.testing.assert_close(two.sum, one.sum, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, two.counts, one.counts))
    assert two.logs.keys() == one.logs.keys()
    for key, pair in one.logs.items():
        torch.testing.assert_close(two.logs[key], pair, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_rows_with_several_questions_about_an_image_stay_alone():
    model = model_of("cascade")
    apart, packed = batches(model, rows_of(media=True, shared=True), 40)
    assert len(packed.sequence.tokens) < len(apart.sequence.tokens)
    one, two = (Masked(normaliser="row").step(model, each) for each in (apart, packed))
    torch.testing.assert_close(two.sum, one.sum, rtol=1e-5, atol=1e-5)
    assert two.count == one.count


@pytest.mark.parametrize("attention", ["full", "prefix", "cascade", "block_causal"])
def test_a_conversation_does_not_change_the_logits_of_another(attention):
    model = model_of(attention, 3).eval()
    rows = rows_of(media=True)
    changed = list(rows)
    turn = rows[0].turns[0]
    changed[0] = Row((), (Turn((turn.parts[0] * 0 + 5,), turn.answer * 0 + 7),))
    found = []
    for given in (rows, changed):
        _, packed = batches(model, given, 60)
        assert len(packed.sequence.tokens) == 1
        everything = torch.ones_like(packed.sequence.mask)
        found.append(model.logits_at(packed.sequence, everything))
    branch = packed.sequence.branch[0]
    width = packed.packing.apart.mask.shape[1]
    own = packed.packing.place[0] // width == 0
    assert len(set(branch[own].tolist())) == 1
    before, after = found
    assert torch.equal(before[~own], after[~own])
    assert (before[own] - after[own]).abs().max() > 0.1


def test_positions_begin_anew_and_no_token_is_lost():
    model = model_of()
    apart, packed = batches(model, rows_of(), 16)
    sequence = packed.sequence
    begins = sequence.mask & (sequence.positions == 0)
    assert int(begins.sum()) == len(SIZES)
    assert (
        sequence.tokens[sequence.mask]
        .sort()
        .values.equal(apart.sequence.tokens[apart.sequence.mask].sort().values)
    )
    split = packed.apart.sequence
    assert torch.equal(split.tokens, apart.sequence.tokens)
    assert torch.equal(split.mask, apart.sequence.mask)


def test_rows_are_filled_longest_first():
    found = bins([5, 9, 3, 3, 12, 1], 10)
    assert found == [[4], [1, 5], [0, 2], [3]]
    assert bins([], 10) == []
