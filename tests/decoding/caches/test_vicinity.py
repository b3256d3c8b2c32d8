import pytest
import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.vicinity import VicinityCache
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks

PROMPT = torch.tensor([[3, 4, 5, 6]])


def computed(toy, watch, cache: VicinityCache, *more, **kind) -> list[tuple[int, int]]:
    """Positions of every forward for a prompt of 4 and two blocks of 3."""
    forwards = watch(toy(**kind))
    got = decode(toy(**kind), PROMPT, 6, [Blocks(3), cache, *more])
    assert got.nfe == len(forwards)
    return [f.rows for f in forwards]


@pytest.mark.parametrize(
    ("cache", "want"),
    [
        (VicinityCache(1, 2), [(0, 10), (3, 9), (3, 9), (0, 10), (6, 10), (6, 10)]),
        (VicinityCache(0, 0), [(0, 10), (4, 7), (4, 7), (0, 10), (7, 10), (7, 10)]),
        (VicinityCache(), [(0, 10)] * 6),  # farther than the canvas
        (VicinityCache(1, 1, every=2), [(0, 10), (3, 8), (0, 10), (0, 10), (6, 10), (0, 10)]),
        (VicinityCache(1, 1, warmup=2), [(0, 10), (0, 10), (3, 8), (0, 10), (6, 10), (6, 10)]),
        (VicinityCache(1, 1, warmup=9), [*[(0, 10)] * 4, (6, 10), (6, 10)]),
    ],
)
def test_the_block_and_its_neighbours_are_computed(cache, want, toy, watch) -> None:
    assert computed(toy, watch, cache) == want


def test_in_a_shifted_family_the_position_before_the_block_is_always_computed(toy, watch) -> None:
    want = [(0, 10), (3, 7), (3, 7), (0, 10), (6, 10), (6, 10)]
    assert computed(toy, watch, VicinityCache(0, 0), shift=True) == want
    assert computed(toy, watch, VicinityCache(1, 0), shift=True) == want
    want = [(0, 10), (2, 7), (2, 7), (0, 10), (5, 10), (5, 10)]
    assert computed(toy, watch, VicinityCache(2, 0), shift=True) == want


def test_the_final_positions_of_a_prefix_model_are_not_recomputed(toy, watch) -> None:
    want = [(0, 10), (4, 7), (4, 7), (4, 10), (5, 10), (5, 10)]
    assert computed(toy, watch, VicinityCache(2, 0), attention="prefix") == want


def test_a_block_finished_by_its_full_pass_costs_one_forward(toy, watch) -> None:
    assert computed(toy, watch, VicinityCache(1, 1), TopK(2)) == [(0, 10)] * 2


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 0), (0, 2), (3, 2)])
def test_every_step_is_what_it_is_by_hand(before, after, shift, toy, watch) -> None:
    """Keys of a full pass when a block opens, those of the vicinity rewritten step by step."""
    model = toy(shift=shift)
    forwards = watch(model)
    decode(model, PROMPT, 6, [Blocks(3), VicinityCache(before, after)])
    kv = None
    for i, step in enumerate(list(forwards)):
        start = 4 if i < 3 else 7
        first, last = start - max(before, shift), min(start + 3 + after, 10)
        if i % 3 == 0:
            kv, first, last = model.backbone.cache(1, 10), 0, 10
        at = torch.arange(10)[None]
        x = model.backbone.tokens(step.tokens[:, first:last])
        hidden = model.backbone(x, at[:, first:last], kv, rows=slice(first, last))
        logits = torch.zeros(1, 10, 50)
        logits[:, first + shift : last + shift] = model.backbone.head(hidden)[
            :, : 10 - first - shift
        ]
        torch.testing.assert_close(step.logits, step.scored(logits))


def test_without_neighbours_it_is_the_dual_cache(toy) -> None:
    chosen = [Blocks(3), Threshold(0.2)]
    ours, dual = (
        decode(toy(), PROMPT, 9, [*chosen, c]) for c in (VicinityCache(0, 0), DualCache())
    )
    assert ours.tokens.equal(dual.tokens)
    assert ours.nfe == dual.nfe
    near = decode(toy(), PROMPT, 9, [*chosen, VicinityCache(1, 1)])
    assert not torch.allclose(near.history.confidence, dual.history.confidence)


def test_blocks_of_the_models_own_have_their_neighbours_too(toy, watch) -> None:
    """A prompt of 5 and blocks of 4: what comes after a block does not exist for it."""
    forwards = watch(toy(attention="block_causal", block_size=4))
    decode(
        toy(attention="block_causal", block_size=4),
        PROMPT.repeat(1, 2)[:, :5],
        7,
        [VicinityCache(0, 3)],
    )
    want = [(0, 8), (5, 8), (5, 8), (4, 12), (8, 12), (8, 12), (8, 12)]
    assert [f.rows for f in forwards] == want


@pytest.mark.parametrize("given", [{"before": -1}, {"after": -1}, {"every": 0}, {"warmup": -2}])
def test_bad_numbers_are_named(given: dict) -> None:
    with pytest.raises(ValueError, match=f"VicinityCache.{next(iter(given))} is"):
        VicinityCache(**given)
