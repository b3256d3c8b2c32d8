import pytest
import torch

from mmdlm.decoding.caches.block_cache import BlockCache
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.plans.sub_blocks import SubBlocks
from mmdlm.decoding.strategy import Strategy

PROMPT = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(6))
CAUSAL = {"attention": "block_causal", "block_size": 4}
KINDS = [
    {},
    {"attention": "prefix"},
    {"attention": "cascade", "block_size": 4},
    CAUSAL,
    CAUSAL | {"shift": True},
    {"attention": "block_causal", "block_size": 1, "shift": True},
]


def computed(toy, watch, known: int, length: int, *more: Strategy, **kind) -> list[tuple[int, int]]:
    forwards = watch(toy(**kind))
    got = decode(toy(**kind), PROMPT[:1, :known], length, [BlockCache(), *more])
    assert got.nfe == len(forwards)
    return [f.rows for f in forwards]


def test_the_prompt_and_every_full_block_get_a_separate_forward(toy, watch) -> None:
    got = computed(toy, watch, 5, 7, Threshold(0.0), **CAUSAL)
    assert got == [(0, 4), (4, 8), (4, 8), (8, 12)]
    # A prompt inside the first block is stored with that block.
    assert computed(toy, watch, 3, 3, **CAUSAL) == [(0, 4), (0, 4), (4, 6), (4, 6)]


def test_the_forward_that_stores_a_block_scores_a_position_that_is_opened_alone(toy, watch) -> None:
    kind = CAUSAL | {"shift": True}
    at = [(0, 4), (4, 8), (4, 8), (8, 12)]
    assert computed(toy, watch, 4, 8, SubBlocks(4), Threshold(0.0), **kind) == at
    # Opened with its block, it is scored from the position before, computed once more.
    at = [(0, 4), (3, 8), (4, 8), (7, 12)]
    assert computed(toy, watch, 4, 8, Threshold(0.0), **kind) == at


def test_what_is_stored_alone_is_the_prompt_in_a_prefix_model_and_nothing_in_others(
    toy, watch
) -> None:
    assert computed(toy, watch, 5, 2, attention="prefix") == [(0, 5), (5, 7), (5, 7)]
    assert computed(toy, watch, 5, 2) == [(0, 7), (0, 7)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("more", [[], [Blocks(3), Threshold(0.2)], [CFG(1.5), Threshold(0.2)]])
def test_nothing_else_changes(kind: dict, more: list[Strategy], toy) -> None:
    mask = torch.tensor([[0] * n + [1] * (7 - n) for n in (0, 3, 1)])
    exact, stored = (
        decode(toy(**kind), PROMPT, 9, [*given, *more], mask=mask) for given in ([], [BlockCache()])
    )
    assert stored.tokens.equal(exact.tokens)
    assert stored.history.step.equal(exact.history.step)
    torch.testing.assert_close(stored.history.confidence, exact.history.confidence)
    assert stored.nfe >= exact.nfe
