"""What strategies require of the model and of each other."""

import pytest

from mmdlm import discover
from mmdlm.decoding.caches.elastic_cache import ElasticCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.caches.sub_block_cache import SubBlockCache
from mmdlm.decoding.caches.window_diffusion import WindowDiffusion
from mmdlm.decoding.commits.prophet import Prophet
from mmdlm.decoding.commits.sched import SchED
from mmdlm.decoding.decode import decode
from mmdlm.decoding.lengths.daedal import DAEDAL
from mmdlm.decoding.lengths.dystruct import Dystruct
from mmdlm.decoding.lengths.end_cut import EndCut
from mmdlm.decoding.strategy import BY_HOOK, PROPERTIES, Strategy, denied

BLOCKS = {"attention": "block_causal", "block_size": 4}
STRATEGIES = discover.classes("mmdlm.decoding", Strategy).values()
SAYS = {
    "an answer that can be filled in any order, but this model has block_causal attention in "
    "blocks of 4": [ElasticCache(), WindowDiffusion()],
    "full attention, but this model has block_causal attention": (
        [PrefixLM(), DAEDAL(), Dystruct(), EndCut()]
    ),
}


@pytest.mark.parametrize(
    ("strategy", "says"),
    [(strategy, says) for says, group in SAYS.items() for strategy in group],
    ids=lambda x: type(x).__name__ if isinstance(x, Strategy) else "",
)
def test_the_strategy_that_does_not_fit_the_model_is_named(
    strategy: Strategy, says: str, toy, run
) -> None:
    name = type(strategy).__name__
    with pytest.raises(ValueError, match=f"^{name} requires {says}; leave {name} out$"):
        run(toy(**BLOCKS), strategy)


def test_every_property_is_required_and_can_be_missing() -> None:
    required = {name for kind in STRATEGIES for name in kind.requires}
    by_strategies = {name for kind in STRATEGIES for name in denied(kind)}
    assert required == set(PROPERTIES)
    assert by_strategies | {"full_attention", "any_order", "masks"} == set(PROPERTIES)
    assert set(BY_HOOK.values()) <= by_strategies


@pytest.mark.parametrize("exits", [Prophet(0.5, 0.5, 0.5), SchED(high=0.5, low=0.5)])
@pytest.mark.parametrize("cache", [[], [SubBlockCache()]])
@pytest.mark.parametrize("kind", [{}, BLOCKS])
def test_rows_exit_early_by_themselves(
    exits: Strategy, cache: list[Strategy], kind: dict, toy, prompts
) -> None:
    model, sizes = toy(**kind), (6, 5, 3)
    tokens, mask = prompts(*sizes)
    batch = decode(model, tokens, 9, [exits, *cache], mask=mask)
    assert max(batch.forwards) < 9
    for i, size in enumerate(sizes):
        alone = decode(model, tokens[i : i + 1, -size:], 9, [exits, *cache])
        assert batch.tokens[i, 6:].equal(alone.tokens[0, size:])
        assert batch.forwards[i] == alone.nfe
