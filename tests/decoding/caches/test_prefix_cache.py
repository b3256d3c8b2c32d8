import pytest
import torch

from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks

PROMPT = torch.tensor([[3, 4, 5, 6]])


def test_a_block_opens_with_a_full_pass_that_commits(toy, watch) -> None:
    forwards = watch(toy())
    got = decode(toy(), PROMPT, 6, [Blocks(3), PrefixCache()])
    assert [f.rows for f in forwards] == [(0, 10), (4, 10), (4, 10), (0, 10), (7, 10), (7, 10)]
    assert all(f.cached for f in forwards)
    assert got.history.step.sort().values.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_a_block_finished_by_its_full_pass_costs_one_forward(toy, watch) -> None:
    forwards = watch(toy())
    assert decode(toy(), PROMPT, 6, [Blocks(3), PrefixCache(), TopK(2)]).nfe == 2
    assert [f.rows for f in forwards] == [(0, 10), (0, 10)]


def test_in_a_shifted_family_the_full_pass_fills_the_first_position_only(toy, watch) -> None:
    model = toy(shift=True)
    forwards = watch(model)
    got = decode(model, PROMPT, 6, [Blocks(3), PrefixCache(), Threshold(0.0)])
    assert [f.rows for f in forwards] == [(0, 10), (4, 10), (0, 10), (7, 10)]
    assert [f.read for f in forwards] == [(4, 5), (5, 7), (7, 8), (8, 10)]
    assert got.history.step.tolist() == [[0, 1, 1, 2, 3, 3]]


def test_final_rows_of_a_prefix_model_are_not_renewed(toy, watch) -> None:
    model = toy(attention="prefix")
    forwards = watch(model)
    decode(model, PROMPT, 6, [Blocks(3), PrefixCache(), TopK(4)])
    assert [f.rows for f in forwards] == [(0, 10), (4, 10), (4, 10), (7, 10)]


@pytest.mark.parametrize("shift", [False, True])
def test_within_a_block_the_prefix_is_as_it_was_when_the_block_opened(
    shift: bool, toy, watch
) -> None:
    """The logits of a cached step, by hand: keys and values of a full pass, then of the tail."""
    model = toy(shift=shift)
    forwards = watch(model)
    decode(model, PROMPT, 6, [Blocks(6), PrefixCache()])
    full, *later = forwards
    for step in later:
        kv = model.backbone.cache(1, 10)
        at = torch.arange(10)[None]
        model.backbone(model.backbone.tokens(full.tokens), at, kv)
        tail = model.backbone(
            model.backbone.tokens(step.tokens[:, 4:]), at[:, 4:], kv, rows=slice(4, 10)
        )
        row = torch.arange(10)[None] - int(shift) - 4  # of the tail, that scores a position
        want = model.backbone.head(tail[:, step.scored(row)[0]])
        want[..., 2] = step.logits[..., 2]
        torch.testing.assert_close(step.logits, want)
