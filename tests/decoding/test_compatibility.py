"""What a model's layout rules out."""

import pytest

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.elastic_cache import ElasticCache
from mmdlm.decoding.caches.free_cache import FreeCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.prompt_once import PromptOnce
from mmdlm.decoding.caches.sub_block_cache import SubBlockCache
from mmdlm.decoding.caches.vicinity import VicinityCache
from mmdlm.decoding.caches.window_diffusion import WindowDiffusion
from mmdlm.decoding.commits.prophet import Prophet
from mmdlm.decoding.commits.sched import SchED
from mmdlm.decoding.decode import decode
from mmdlm.decoding.lengths.daedal import DAEDAL
from mmdlm.decoding.lengths.dystruct import Dystruct
from mmdlm.decoding.lengths.end_cut import EndCut
from mmdlm.decoding.strategy import Strategy

BLOCKS = {"attention": "block_causal", "block_size": 4}
SAYS = {
    "same columns in all rows, but .* take SubBlockCache, or give Blocks a size": (
        [PrefixCache(), DualCache(), PromptOnce(), FreeCache(), VicinityCache()]
    ),
    r"makes it block by block \(block_causal attention\).* leave it out": (
        [ElasticCache(), WindowDiffusion()]
    ),
    "is for full attention only; this model has block_causal": [DAEDAL(), Dystruct(), EndCut()],
    "commits what it sees beyond the block, but .* leave the strategy out": [Prophet(), SchED()],
}


@pytest.mark.parametrize(
    ("strategy", "says"),
    [(strategy, says) for says, group in SAYS.items() for strategy in group],
    ids=lambda x: type(x).__name__ if isinstance(x, Strategy) else "",
)
def test_the_strategy_that_does_not_fit_is_named(strategy: Strategy, says: str, toy, run) -> None:
    with pytest.raises(ValueError, match=f"^{type(strategy).__name__} .*{says}"):
        run(toy(**BLOCKS), strategy)


@pytest.mark.parametrize(
    "exits", [Prophet(0.5, 0.5, 0.5), SchED(high=0.5, low=0.5)], ids=["Prophet", "SchED"]
)
def test_early_exits_need_blocks_that_end_together(exits: Strategy, toy, prompts, run) -> None:
    model, name = toy(**BLOCKS), type(exits).__name__
    with pytest.raises(ValueError, match=f"{name} cannot be combined with SubBlockCache"):
        run(toy(), exits, SubBlockCache())
    tokens = prompts(6, 6, 6)[0]
    batch = decode(model, tokens, 9, [exits])
    assert batch.nfe < 9
    for i in range(3):
        alone = decode(model, tokens[i : i + 1], 9, [exits])
        assert batch.tokens[i].equal(alone.tokens[0])
