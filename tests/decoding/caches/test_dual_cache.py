import pytest
import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks

PROMPT = torch.tensor([[3, 4, 5, 6]])


def test_only_the_block_is_computed_after_its_full_pass(toy, watch) -> None:
    forwards = watch(toy())
    decode(toy(), PROMPT, 6, [Blocks(3), DualCache()])
    assert [f.rows for f in forwards] == [(0, 10), (4, 7), (4, 7), (0, 10), (7, 10), (7, 10)]


def test_the_full_pass_of_a_shifted_family_fills_the_first_position_of_the_block(
    toy, watch
) -> None:
    model = toy(shift=True)
    forwards = watch(model)
    got = decode(model, PROMPT, 6, [Blocks(3), DualCache(), Threshold(0.0)])
    assert [f.rows for f in forwards] == [(0, 10), (4, 7), (0, 10), (7, 10)]
    assert got.history.step.tolist() == [[0, 1, 1, 2, 3, 3]]


@pytest.mark.parametrize("shift", [False, True])
def test_in_the_last_block_dual_and_prefix_are_the_same(shift: bool, toy) -> None:
    prompt = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    dual, prefix = (
        decode(toy(shift=shift), prompt, 8, [Blocks(8), cache])
        for cache in (DualCache(), PrefixCache())
    )
    assert dual.tokens.equal(prefix.tokens)
    torch.testing.assert_close(dual.history.confidence, prefix.history.confidence)


def test_what_lies_outside_the_block_is_as_it_was_when_the_block_opened(toy, watch) -> None:
    """The logits of a cached step, by hand: keys of a full pass, those of the block rewritten."""
    model = toy()
    forwards = watch(model)
    decode(model, PROMPT, 6, [Blocks(3), DualCache()])
    full, *later = forwards[:3]
    for step in later:
        kv, at = model.backbone.cache(1, 10), torch.arange(10)[None]
        model.backbone(model.backbone.tokens(full.tokens), at, kv)
        block = model.backbone.tokens(step.tokens[:, 4:7])
        hidden = model.backbone(block, at[:, 4:7], kv, rows=slice(4, 7))
        want = model.backbone.head(hidden[:, step.scored(torch.arange(10)[None] - 4)[0]])
        want[..., 2] = step.logits[..., 2]
        torch.testing.assert_close(step.logits, want)
