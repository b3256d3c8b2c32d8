"""Chunked cross entropy equals the unchunked one and never holds all logits."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.layout import Row, Turn
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.cross_entropy import cross_entropy, weighted_cross_entropy
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.next_token import NextToken
from mmdlm.objectives.objective import Batch

VOCAB = 37


def model_of(shift=False, block_size=None, **settings):
    config = TransformerConfig(vocab=VOCAB, width=16, layers=2, heads=2, inner=32, **settings)
    attention = "full" if block_size is None else "prefix"
    spec = Spec(
        "mmdlm",
        config,
        mask_id=2,
        eos_id=1,
        pad_id=0,
        shift=shift,
        attention=attention,
        block_size=block_size,
    )
    model = MultimodalDLM(spec)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return model


def batch_of(model):
    ids = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    rows = [Row((), (Turn(each[: 3 + i], each[3 + i :]),)) for i, each in enumerate(ids)]
    return Batch(model.arrange(rows), torch.arange(3), torch.arange(3).double() / 3)


def outcome(model, objective):
    """Loss, metrics and gradients of one step, and the most logits of one call of the head."""
    sizes, head = [], model.backbone.head

    def watched(hidden, columns=None):
        logits = head(hidden, columns)
        sizes.append(logits.shape[:-1].numel())
        return logits

    model.backbone.head = watched
    model.zero_grad()
    losses = objective.step(model, batch_of(model))
    loss = losses.mean()
    loss.backward()
    del model.backbone.head
    logs = {name: (float(a), float(b)) for name, (a, b) in losses.logs.items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), logs, gradients, max(sizes)


@pytest.mark.parametrize("chunk", [1, 4, 7])
@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        ({}, Masked),
        ({"tied": True}, Masked),
        ({"shift": True}, Masked),
        ({"shift": True, "block_size": 1}, NextToken),
    ],
)
def test_chunks_change_neither_loss_nor_gradients(settings, objective, chunk):
    model = model_of(**settings)
    whole, logs, gradients, most = outcome(model, objective())
    assert most > 7  # all scored positions at once
    loss, chunked_logs, chunked, largest = outcome(model, objective(chunk=chunk))
    assert largest == chunk
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=1e-6)
    for name, pair in logs.items():
        assert chunked_logs[name] == pytest.approx(pair, rel=1e-6)
    assert gradients.keys() == chunked.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-5, atol=1e-6)


def test_equals_the_plain_formula():
    model = model_of()
    sequence = batch_of(model).sequence
    at = sequence.is_answer
    target = sequence.tokens[at]
    found = cross_entropy(model, sequence, at, target, 5)
    logits = model.logits_at(sequence, at).float()
    torch.testing.assert_close(found.losses, F.cross_entropy(logits, target, reduction="none"))
    assert torch.equal(found.right, (logits.argmax(-1) == target).float())


def test_saved_tensors_hold_no_logits_of_other_chunks():
    model = model_of()
    sequence = batch_of(model).sequence
    at, saved = sequence.is_answer, []

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor

    hidden_only = model.hidden_at(sequence, at).detach().requires_grad_()
    model.hidden_at = lambda *_: hidden_only
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = cross_entropy(model, sequence, at, sequence.tokens[at], 4)
    rows = [shape[0] for shape in saved if len(shape) == 2 and shape[1] == VOCAB]
    assert rows == []
    scores.losses.sum().backward()
    assert hidden_only.grad.abs().sum() > 0


def test_no_scored_position_gives_a_zero_loss_with_a_graph():
    model = model_of()
    sequence = batch_of(model).sequence
    nowhere = torch.zeros_like(sequence.is_answer)
    found = cross_entropy(model, sequence, nowhere, sequence.tokens[nowhere], 4)
    assert len(found.losses) == len(found.right) == 0
    found.losses.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("objective", [Masked, NextToken])
def test_chunks_hold_at_least_one_position(objective):
    with pytest.raises(ValueError, match="chunk is 0, expected at least 1"):
        objective(chunk=0)


def scored(model):
    """Arguments of a score of uneven numbers of positions per row, with uneven weights."""
    sequence = batch_of(model).sequence
    at = sequence.is_answer.clone()
    at[1] = False  # a row without a scored position
    at[2, ::2] = False
    target = sequence.tokens[at]
    return sequence, at, target, torch.linspace(0.5, 3.0, len(target))


def plain(model, sequence, at, target, weights):
    """The weighted sum from the logits of every position."""
    if model.spec.shift:
        at = torch.cat([at[:, 1:], torch.zeros_like(at[:, :1])], 1)
    logits = model.backbone.head(model.hidden(sequence)).float()[at]
    return (weights * F.cross_entropy(logits, target, reduction="none")).sum()


def gradients(model, total):
    model.zero_grad()
    (total / 7).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "settings",
    [{}, {"tied": True}, {"bias": True}, {"logit_scale": 0.5}, {"shift": True}, {"kv_heads": 1}],
)
def test_weighted_sum_has_the_gradients_of_the_plain_formula(settings):
    model = model_of(**settings)
    given = scored(model)
    want = plain(model, *given)
    total, scores = weighted_cross_entropy(model, *given, 4)
    assert total.item() == pytest.approx(want.item(), rel=1e-6)
    assert (given[3] * scores.losses).sum().item() == pytest.approx(want.item(), rel=1e-6)
    assert not scores.losses.requires_grad
    expected = gradients(model, want)
    found = gradients(model, total)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_weighted_sum_works_with_autocast_checkpointing_and_frozen_heads():
    model = model_of()
    given = scored(model)
    with torch.autocast("cpu", torch.bfloat16):
        want = gradients(model, plain(model, *given))
        found = gradients(model, weighted_cross_entropy(model, *given, 4)[0])
    for name, gradient in want.items():
        assert found[name].dtype == torch.float32
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 0.03, name
    want = gradients(model, plain(model, *given))
    model.backbone.checkpointing = True
    model.backbone.out.weight.requires_grad_(False)
    found = gradients(model, weighted_cross_entropy(model, *given, 4)[0])
    assert want.keys() - found.keys() == {"backbone.out.weight"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6)


def test_a_wrapped_head_is_scored_as_a_whole():
    class LowRank(torch.nn.Linear):
        """A head with another forward than its weight alone, as LoRA makes it."""

    model = model_of()
    given = scored(model)
    plain_head = weighted_cross_entropy(model, *given, 4)[0]
    wrapped = copy.deepcopy(model)
    wrapped.backbone.out.__class__ = LowRank
    total, _ = weighted_cross_entropy(wrapped, *given, 4)
    assert total.item() == pytest.approx(plain_head.item(), rel=1e-6)
    want, found = gradients(model, plain_head), gradients(wrapped, total)
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_weighted_sum_keeps_no_logits_and_gives_its_gradient_away():
    model = model_of()
    given = scored(model)
    saved, sizes, head = [], [], model.backbone.head

    def watched(hidden, columns=None):
        sizes.append(len(hidden))
        return head(hidden, columns)

    model.backbone.head = watched

    def keep(tensor):
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, _ = weighted_cross_entropy(model, *given, 4)
    total.backward(retain_graph=True)
    assert max(sizes) == 4
    assert sum(sizes) == len(given[2])  # no position goes through the head twice
    assert [shape for shape in saved if shape[-1:] == (VOCAB,)] == []
    with pytest.raises(RuntimeError, match="second backward pass"):
        total.backward()


def test_weighted_sum_of_nothing_is_a_zero_with_every_gradient():
    model = model_of()
    sequence, at, target, weights = scored(model)
    total, scores = weighted_cross_entropy(model, sequence, at & False, target[:0], weights[:0], 4)
    assert total.item() == 0
    assert len(scores.losses) == len(scores.right) == 0
    found = gradients(model, total)
    assert found["backbone.out.weight"].abs().sum() == 0
    with torch.no_grad():
        total, _ = weighted_cross_entropy(model, sequence, at, target, weights, 4)
    assert not total.requires_grad


@pytest.mark.parametrize("settings", [{}, {"shift": True}, {"kv_heads": 1, "qk_norm": "whole"}])
def test_hidden_states_of_chosen_positions_equal_those_of_all(settings):
    model = model_of(**settings)
    sequence, at, *_ = scored(model)
    shifted = at
    if model.spec.shift:
        shifted = torch.cat([at[:, 1:], torch.zeros_like(at[:, :1])], 1)
    torch.testing.assert_close(model.hidden_at(sequence, at), model.hidden(sequence)[shifted])
