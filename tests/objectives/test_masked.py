"""The masked objective: published values, closed form and unscored positions."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.layout import Row, Turn
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.draw import GOLDEN
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.objective import Batch


def small(attention="full", block_size=None, shift=False, vocab=12):
    torch.manual_seed(0)
    config = TransformerConfig(vocab=vocab, width=16, layers=2, heads=2, inner=32)
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
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def batch_of(model, rows, seeds=None):
    n = len(rows)
    seeds = torch.arange(n) if seeds is None else seeds
    return Batch(model.arrange(rows), seeds, torch.arange(n).double() / n)


def row(prompt, *answers):
    turns = tuple(Turn(torch.tensor(prompt), torch.tensor(a)) for a in answers)
    return Row((), turns)


def test_only_answers_are_masked_and_scored():
    model = small()
    batch = batch_of(model, [row([3, 4, 5], [6, 7, 1]), row([3], [8, 1])], torch.tensor([5, 9]))
    noise = Masked(full=1.0).corrupt(batch)
    answer = batch.sequence.is_answer
    assert torch.equal(noise.masked, answer)
    assert (noise.p[answer] == 1).all()


def test_masks_and_loss_do_not_depend_on_padding_or_batch():
    model = small()
    rows = [row([3, 4, 5, 6], [6, 7, 8, 1]), row([9], [8, 1])]
    objective = Masked(full=0.3)
    seeds, phase = torch.tensor([11, 12]), torch.tensor([0.2, 0.7], dtype=torch.float64)
    both = objective.step(model, Batch(model.arrange(rows), seeds, phase))
    single = [
        objective.step(model, Batch(model.arrange([r]), seeds[i : i + 1], phase[i : i + 1]))
        for i, r in enumerate(rows)
    ]
    torch.testing.assert_close(both.sum, single[0].sum + single[1].sum, rtol=1e-5, atol=1e-6)
    assert both.count == single[0].count + single[1].count


def test_turns_that_share_media_equal_separate_rows():
    model = small("cascade")
    parts = (torch.randn(3, 16),)
    turns = [
        Turn(torch.tensor([7]), torch.tensor([8, 1])),
        Turn(torch.tensor([9, 3]), torch.tensor([10])),
    ]
    together = model.arrange([Row(parts, tuple(turns))])
    hidden = model.hidden(together)[0]
    at = 3
    for turn in turns:
        alone = model.hidden(model.arrange([Row(parts, (turn,))]))[0]
        size = len(turn.prompt) + len(turn.answer)
        torch.testing.assert_close(hidden[at : at + size], alone[3:], rtol=1e-5, atol=1e-6)
        at += size


def test_turns_cannot_share_a_prompt_that_attends_to_them():
    rows = [Row((torch.randn(3, 16),), (Turn(torch.tensor([7]), torch.tensor([8])),) * 2)]
    with pytest.raises(ValueError, match="cascade"):
        small("prefix").arrange(rows)
    text = [Row((torch.tensor([3]),), rows[0].turns)]
    with pytest.raises(ValueError, match="2 turns share text"):
        small("cascade").arrange(text)


def test_expectation_is_the_closed_form():
    """Averaged over draws, 1/t weighting gives the enumerated bound of an order-agnostic model."""
    model = small(vocab=6).eval()
    answer = [3, 5, 4]
    rows = [row([4], answer)]
    sequence = model.arrange(rows)
    with torch.no_grad():
        exact = 0.0
        for k in range(1, 4):
            sets = list(itertools.combinations(range(3), k))
            for chosen in sets:
                tokens = sequence.tokens.clone()
                for i in chosen:
                    tokens[0, 1 + i] = 2
                masked = torch.zeros_like(tokens, dtype=torch.bool)
                masked[0, [1 + i for i in chosen]] = True
                logits = model.logits_at(sequence.with_tokens(tokens), masked)
                loss = F.cross_entropy(logits, sequence.tokens[masked], reduction="sum")
                exact += loss.item() / k / len(sets)
        n = 3000
        batch = batch_of(model, rows * n, torch.arange(n))
        losses = Masked(eps=1e-6).step(model, batch)
    estimate = losses.sum.item() / n
    assert estimate == pytest.approx(exact, rel=0.05)


def test_a_shifted_model_does_not_score_the_first_token_of_a_row():
    """No position comes before it, so nothing predicts it."""
    model = small(shift=True)
    empty = torch.zeros(0, dtype=torch.long)
    rows = [Row((), (Turn(empty, torch.tensor([4, 5, 6])),)), row([3, 4], [5, 6])]
    losses = Masked("one", "masked", full=1.0).step(model, batch_of(model, rows))
    assert losses.count == 2 + 2
    assert losses.sum.isfinite()


def test_random_model_starts_near_log_vocabulary():
    model = small(vocab=50)
    model.backbone.reset(torch.Generator().manual_seed(1))
    batch = batch_of(model, [row([3, 4], [5, 6, 7, 1])] * 64)
    losses = Masked(weight="one", normaliser="masked").step(model, batch)
    assert (losses.sum / losses.count).item() == pytest.approx(math.log(50), rel=0.05)


def test_loss_without_masks_is_zero_with_a_graph():
    model = small()
    batch = batch_of(model, [row([3], [4])], torch.tensor([1]))
    objective = Masked(eps=0.0)
    batch = Batch(batch.sequence, batch.seeds, torch.tensor([1 - GOLDEN], dtype=torch.float64))
    losses = objective.step(model, batch)
    assert losses.mean().item() == 0
    losses.sum.backward()


@pytest.mark.parametrize("bad", [{"weight": "2/t"}, {"eps": 1.0}, {"full": 2}, {"normaliser": "b"}])
def test_invalid_arguments_are_rejected(bad):
    with pytest.raises(ValueError, match=r"Masked\.\w+ is .*, expected"):
        Masked(**bad)


def test_end_tokens_fill_the_block_of_the_first_one():
    model = small(attention="block_causal", block_size=4)
    rows = [
        row([3, 4], [6, 1, 1, 1, 1, 1, 1]),  # ends at position 3, the last of its block
        row([3, 4], [6, 7, 1, 1, 1, 1, 1]),  # at position 4, the first of its block
        row([3, 4], [6, 7, 8]),  # without an end token
    ]
    batch = Batch(model.arrange(rows), torch.arange(3), torch.zeros(3).double())
    whole = Masked(ends="block").prepare(model, batch).sequence
    answers = [
        tokens[keep].tolist() for tokens, keep in zip(whole.tokens, whole.is_answer, strict=True)
    ]
    assert answers == [[6, 1], [6, 7, 1, 1, 1, 1], [6, 7, 8, 1, 1, 1]]
    assert torch.equal(whole.level, whole.positions // 4)


def test_whole_blocks_need_a_model_with_blocks():
    model = small()
    batch = Batch(model.arrange([row([3], [6])]), torch.arange(1), torch.zeros(1).double())
    with pytest.raises(ValueError, match="ends is 'block', which needs.*not full"):
        Masked(ends="block").step(model, batch)
