"""The contrastive objective: a slow reference, batches in parts, repeated answers, settings."""

import pytest
import torch
import torch.nn.functional as F

import mmdlm
from mmdlm.data.collate import batch, collate
from mmdlm.messages import Example, Slot, assistant, user
from mmdlm.objectives.contrastive import Contrastive

PAIRS = [
    ("a red circle", "red"),
    ("a large blue square", "blue square"),
    ("a green circle", "green"),
    ("circle", "small"),
]


@pytest.fixture
def made():
    model = mmdlm.load("tiny")

    def make(pairs=PAIRS, images=None):
        examples = [
            Example((user(question), assistant(Slot(value=answer, length=4))))
            for question, answer in pairs
        ]
        seeds = torch.arange(len(examples))
        return model, batch(model, collate(model.processor, examples, seeds, seeds.double() / 9))

    return make


def cosines(model, pairs, **options):
    queries = mmdlm.embed(model, [[{"role": "user", "content": q}] for q, _ in pairs], **options)
    documents = mmdlm.embed(model, text=[d for _, d in pairs], **options)
    return queries, documents


@pytest.mark.parametrize("pooling", ["mean", "text", "last"])
def test_the_loss_is_that_of_the_embeddings(made, pooling):
    model, rows = made()
    losses = Contrastive(temperature=0.2, pooling=pooling).step(model, rows)
    queries, documents = cosines(model, PAIRS, pooling=pooling)
    scores, target = queries @ documents.T / 0.2, torch.arange(4)
    wanted = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    assert losses.mean().item() == pytest.approx(float(wanted), abs=1e-4)


def test_masks_give_one_vector_each(made):
    model, rows = made()
    losses = Contrastive(temperature=0.01, masks=3).step(model, rows)
    queries, documents = cosines(model, PAIRS, masks=3)
    scores = torch.zeros(4, 4)
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            scores[i, j] = sum(max(float(q @ d) for d in document) for q in query) / 3 / 0.01
    target = torch.arange(4)
    wanted = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    assert losses.mean().item() == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"masks": 2, "sparse_weight": 0.5}])
def test_parts_of_a_batch_give_the_same_loss_and_gradient(made, options):
    model, rows = made()
    found = []
    for size in (None, 1, 3):
        model.zero_grad()
        loss = Contrastive(rows=size, **options).step(model, rows).mean()
        loss.backward()
        found.append((loss.item(), model.backbone.blocks[0].attn.qkv.weight.grad.clone()))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert torch.allclose(gradient, found[0][1], atol=1e-5)


def test_rows_with_the_same_answer_are_not_negatives(made):
    model, rows = made([*PAIRS[:2], ("a square", "red")])
    losses = Contrastive(temperature=0.1).step(model, rows)
    queries, documents = cosines(model, [*PAIRS[:2], ("a square", "red")])
    scores = queries @ documents.T / 0.1
    scores[0, 2] = scores[2, 0] = -torch.inf
    target = torch.arange(3)
    wanted = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    assert losses.mean().item() == pytest.approx(float(wanted), abs=1e-4)


def test_sparse_weights_leave_special_tokens_out(made):
    from mmdlm.representation import part, sparse, with_masks

    model, rows = made()
    weights = sparse(model, with_masks(model, part(model, rows.sequence, True), 2))
    assert weights.shape == (4, model.spec.transformer.vocab)
    special = [model.spec.mask_id, model.spec.eos_id, model.spec.pad_id]
    assert weights[:, special].eq(0).all()
    assert weights.ge(0).all()
    assert weights.gt(0).any()


def test_a_few_steps_put_pairs_first(made):
    model, rows = made()
    objective = Contrastive(temperature=0.1)
    optimizer = torch.optim.AdamW(model.backbone.parameters(), 3e-4)
    first = objective.step(model, rows)
    for _ in range(20):
        optimizer.zero_grad()
        objective.step(model, rows).mean().backward()
        optimizer.step()
    last = objective.step(model, rows)
    assert last.mean().item() < 0.5 * first.mean().item()
    assert float(last.logs["recall@1"][0]) == 4


def test_wrong_settings_and_batches_are_named(made):
    with pytest.raises(ValueError, match="without masks"):
        Contrastive(sparse_weight=1.0)
    model, rows = made(PAIRS[:1])
    with pytest.raises(ValueError, match="one row"):
        Contrastive().step(model, rows)
