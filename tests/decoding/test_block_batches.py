"""Rows of one batch whose blocks start at different places: each is what it is alone."""

import pytest
import torch

from mmdlm.decoding.caches.block_cache import BlockCache
from mmdlm.decoding.caches.sub_block_cache import SubBlockCache
from mmdlm.decoding.commits.dynamic import Dynamic
from mmdlm.decoding.decode import decode
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.plans.sub_blocks import SubBlocks
from mmdlm.decoding.scores.left_to_right import LeftToRight
from mmdlm.decoding.strategy import Strategy

EOS, PAD, LENGTH = 1, 0, 14
SIZES = (9, 4, 6, 8)
"""Blocks of 4: 1, 0, 2 and 0 tokens of the prompt in the first one."""


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    "chosen",
    [
        [Dynamic(2, tau=0.4)],
        [Dynamic(3, tau=1), LeftToRight()],
        [SubBlocks(2), Dynamic(tau=0.3)],
        [SubBlocks(3), Dynamic(2, tau=0.3), BlockCache()],
        [SubBlocks(2), Dynamic(tau=0.3), SubBlockCache()],
        [SubBlocks(3), SubBlockCache()],
        [Dynamic(tau=0.3), SubBlockCache()],
    ],
    ids=str,
)
def test_a_row_of_a_batch_of_blocks_is_what_it_is_alone(
    chosen: list[Strategy], shift: bool, toy
) -> None:
    model = toy(attention="block_causal", block_size=4, shift=shift)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 50, (n,), generator=generator) for n in SIZES]
    width = max(SIZES)
    tokens = torch.stack([torch.cat([torch.full((width - len(p),), PAD), p]) for p in prompts])
    mask = torch.tensor([[False] * (width - n) + [True] * n for n in SIZES])
    # Few ids, so that some texts end early, within their block.
    given = {"columns": slice(0, 12)}
    batch = decode(model, tokens, LENGTH, [*chosen, EndOfText()], mask=mask, **given)
    ends = []
    for i, prompt in enumerate(prompts):
        alone = decode(model, prompt[None], LENGTH, [*chosen, EndOfText()], **given)
        assert batch.tokens[i, width:].tolist() == alone.tokens[0, len(prompt) :].tolist()
        assert batch.history.step[i].equal(alone.history.step[0])
        assert batch.forwards[i] == alone.nfe
        ends.append(int((alone.history.step >= 0).sum()))
    assert len(set(ends)) > 1
