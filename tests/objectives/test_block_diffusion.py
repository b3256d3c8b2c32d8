"""Block diffusion against one forward per block."""

import pytest
import torch
import torch.nn.functional as F

from mmdlm.layout import Row, Turn
from mmdlm.objectives.block_diffusion import BlockDiffusion
from mmdlm.objectives.complementary import Complementary
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.objective import Batch
from tests.objectives.test_masked import row, small


def batch_of(model, rows):
    n = len(rows)
    return Batch(model.arrange(rows), torch.arange(n) + 7, torch.arange(n).double() / n)


def slow(model, sequence, noise, shift):
    """Cross entropy of each masked token, from a forward over clean tokens and one noisy block."""
    found = []
    for b, n in noise.masked.nonzero().tolist():
        level, branch = sequence.level[b], sequence.branch
        source = n - 1 if shift else n
        block = level[source]
        own = (level == block) if branch is None else (level == block) & (branch[b] == branch[b, n])
        tokens = sequence.tokens.clone()
        tokens[b, own & noise.masked[b]] = model.spec.mask_id
        # Later blocks are not visible, so they need not be removed.
        hidden = model.hidden(sequence.with_tokens(tokens))[b, source]
        found.append(F.cross_entropy(model.backbone.head(hidden), sequence.tokens[b, n]))
    return torch.stack(found)


TURNS = (
    Turn(torch.tensor([7]), torch.tensor([8, 3, 5, 1, 4])),
    Turn(torch.tensor([9, 4]), torch.tensor([10, 4, 6])),
)
PLAIN = [row([3, 4, 5, 7, 6], [6, 7, 8, 9, 10, 1]), row([9, 3], [8, 4, 1]), row([4], [5, 6, 9])]


@pytest.mark.parametrize(
    ("attention", "shift", "media"),
    [
        ("block_causal", False, False),
        ("block_causal", True, False),
        ("prefix", False, False),
        ("prefix", True, False),
        ("cascade", False, True),
        ("block_causal", False, True),
    ],
)
def test_equals_one_forward_per_block(attention, shift, media):
    model = small(attention, 3, shift)
    rows = PLAIN
    if media:
        turns = TURNS if attention == "cascade" else TURNS[:1]
        rows = [Row((torch.randn(4, 16),), turns), Row((torch.randn(2, 16),), turns[:1]), PLAIN[0]]
    batch = batch_of(model, rows)
    objective = Masked("one", "masked", eps=0.5)
    noise = objective.corrupt(batch)
    losses = BlockDiffusion(objective).loss(model, batch, noise)
    want = slow(model, batch.sequence, noise, shift)
    assert losses.count == len(want)
    torch.testing.assert_close(losses.sum, want.sum(), rtol=1e-5, atol=1e-5)


def test_both_orders_of_wrapping_are_equal():
    model = small("block_causal", 4)
    batch, inner = batch_of(model, PLAIN), Masked("one", "masked")
    a = Complementary(BlockDiffusion(inner)).step(model, batch)
    b = BlockDiffusion(Complementary(inner)).step(model, batch)
    torch.testing.assert_close(a.sum, b.sum)
    assert a.count == b.count == batch.sequence.is_answer.sum()


def test_prompt_blocks_are_not_repeated():
    model = small("block_causal", 4)
    batch = batch_of(model, [row([3] * 40, [5, 6, 7])])
    seen = []
    model.hidden_at, whole = (
        lambda sequence, at: seen.append(sequence.tokens.shape[1]) or whole(sequence, at),
        model.hidden_at,
    )
    BlockDiffusion().step(model, batch)
    assert seen == [43 + 3]


def test_a_model_without_blocks_is_rejected():
    model = small()
    with pytest.raises(ValueError, match="block_size None and full attention; set block_size"):
        BlockDiffusion().step(model, batch_of(model, PLAIN))


@pytest.mark.parametrize("wrapper", [BlockDiffusion, Complementary])
def test_an_objective_without_masks_is_rejected(wrapper):
    from mmdlm.objectives.next_token import NextToken

    with pytest.raises(TypeError, match="objective is NextToken, which does not mask tokens"):
        wrapper(NextToken())
