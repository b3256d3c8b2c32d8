"""What holds for every cache; a strategy that decides `refresh` is in at once.

A new one fails here until it says in `EVERYTHING` with which arguments, and beside what, it
recomputes all that can change, and in `SMALL` how it keeps something on a canvas of twelve.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import pytest
import torch

from mmdlm import discover
from mmdlm.decoding.caches.block_cache import BlockCache
from mmdlm.decoding.caches.dkv_cache import DKVCache
from mmdlm.decoding.caches.dkv_greedy import DKVGreedy
from mmdlm.decoding.caches.dllm_cache import DLLMCache
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.elastic_cache import ElasticCache
from mmdlm.decoding.caches.exact import Exact
from mmdlm.decoding.caches.free_cache import FreeCache
from mmdlm.decoding.caches.max_logit_cache import MaxLogitCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.prompt_once import PromptOnce
from mmdlm.decoding.caches.sub_block_cache import SubBlockCache
from mmdlm.decoding.caches.vicinity import VicinityCache
from mmdlm.decoding.caches.window_diffusion import WindowDiffusion
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy, denied
from mmdlm.decoding.view import View
from mmdlm.model import MultimodalDLM

LENGTH = 12
CACHES = {n: c for n, c in discover.classes("mmdlm.decoding").items() if "refresh" in c.hooks()}
MODELS = {
    "full": {},
    "full shifted": {"shift": True},
    "prefix shifted": {"attention": "prefix", "shift": True},
    "cascade in blocks": {"attention": "cascade", "block_size": 4},
    "block causal": {"attention": "block_causal", "block_size": 4},
    "block causal shifted": {"attention": "block_causal", "block_size": 4, "shift": True},
}
FULL, PREFIX = tuple(MODELS)[:3], tuple(MODELS)[2:3]
Toy = Callable[..., MultimodalDLM]


class Setting(NamedTuple):
    """A cache with what must stand beside it, and the kinds of model for which this holds."""

    chosen: tuple[Strategy, ...]
    kinds: tuple[str, ...] = tuple(MODELS)


EVERYTHING: dict[str, tuple[Setting, ...]] = {
    "Exact": (Setting((Exact(),)),),
    "BlockCache": (Setting((BlockCache(),)),),
    # A block of one position is opened, and renewed, by every step.
    "PrefixCache": (Setting((PrefixCache(), Blocks(1))),),
    "DualCache": (Setting((DualCache(), Blocks(1))),),
    "SubBlockCache": (Setting((SubBlockCache(), Blocks(1))),),
    "PromptOnce": (
        Setting((PromptOnce(), Blocks(1)), PREFIX),
        Setting((PromptOnce(dual=True), Blocks(1)), PREFIX),
        Setting((PromptOnce(),), PREFIX),
    ),
    "VicinityCache": (
        Setting((VicinityCache(0, 0, every=1),)),
        Setting((VicinityCache(99, 99), Blocks(5))),
        Setting((VicinityCache(0, 0, warmup=99),), FULL),
    ),
    "DKVCache": (
        Setting((DKVCache(every=1),)),
        Setting((DKVCache(every=1, variant="un_right"), Blocks(5))),
        Setting((DKVCache(every=1, prefill=True),), PREFIX),
        Setting((DKVCache(prefill=True, decode=False),), PREFIX),
    ),
    "DKVGreedy": (Setting((DKVGreedy(every=1),)), Setting((DKVGreedy(every=1, steps=5),))),
    "DLLMCache": (
        Setting((DLLMCache(prompt=1, answer=1),), FULL[:2]),
        Setting((DLLMCache(prompt=1, answer=9, ratio=1.0),), FULL[:2]),
    ),
    "ElasticCache": (Setting((ElasticCache(99, gamma=1.5),), FULL),),
    "FreeCache": (Setting((FreeCache(every=1), Blocks(5))), Setting((FreeCache(),), PREFIX)),
    "WindowDiffusion": (Setting((WindowDiffusion(1, 1, every=1),), FULL),),
    "MaxLogitCache": (
        Setting((MaxLogitCache(interval=1),), FULL[:2]),
        Setting((MaxLogitCache(ratio=0.0, warmup=0.0, interval=99),), FULL[:2]),
    ),
}
SMALL: dict[str, tuple[Setting, ...]] = {
    "Exact": (Setting((Exact(),)),),
    "BlockCache": (Setting((BlockCache(),)),),
    "PrefixCache": (Setting((PrefixCache(),)),),
    "DualCache": (Setting((DualCache(),)),),
    "SubBlockCache": (Setting((SubBlockCache(),)),),
    "PromptOnce": (Setting((PromptOnce(),)), Setting((PromptOnce(dual=True),))),
    "VicinityCache": (
        Setting((VicinityCache(1, 1),)),
        Setting((VicinityCache(0, 2, every=3),)),
        Setting((VicinityCache(3, 0, warmup=2),)),
    ),
    "DKVCache": (
        Setting((DKVCache(every=99),)),
        Setting((DKVCache(every=3, variant="un_right"),)),
        Setting((DKVCache(every=3, prefill=True),)),
        Setting((DKVCache(prefill=True, decode=False),)),
    ),
    "DKVGreedy": (Setting((DKVGreedy(1, every=99),)), Setting((DKVGreedy(2, 3, steps=6),))),
    "DLLMCache": (Setting((DLLMCache(5, 3, 0.3),), FULL[:2]),),
    "ElasticCache": (Setting((ElasticCache(3),), FULL),),
    "FreeCache": (Setting((FreeCache(),)), Setting((FreeCache(every=3),))),
    "WindowDiffusion": (
        Setting((WindowDiffusion(2, 4, 5),), FULL),
        Setting((WindowDiffusion(1, 3, 99),), FULL),
    ),
    "MaxLogitCache": (Setting((MaxLogitCache(0.5, 0.2, 3, steps=12),), FULL[:2]),),
}


def settings(table: dict[str, tuple[Setting, ...]]) -> pytest.MarkDecorator:
    cases = [(s.chosen, k) for n in CACHES for s in table.get(n, ()) for k in s.kinds]
    return pytest.mark.parametrize(("chosen", "kind"), cases, ids=str)


def beside(chosen: tuple[Strategy, ...], *more: Strategy) -> list[Strategy]:
    """The chosen, and those of the others that go with them."""
    taken = {hook for s in chosen for hook in s.hooks()} & set(Strategy.ONE_OWNER)
    needs = {name for s in chosen for name in s.requires}
    return [*chosen, *(s for s in more if not taken & {*s.hooks()} and not needs & denied(s))]


def uncached(cache: Strategy) -> Strategy:
    """The strategy with a refresh that keeps nothing, and everything else as it is."""
    cls = type(cache)

    class Plain(cls):
        def refresh(self, view: View) -> Refresh:
            super().refresh(view)
            return Refresh(view.level >= 0, cached=False)

    return Plain(**{f.name: getattr(cache, f.name) for f in fields(cache)})


@pytest.mark.parametrize("name", CACHES)
def test_every_cache_is_in_the_tables(name: str) -> None:
    for table in (EVERYTHING, SMALL):
        assert name in table, (
            f"{name} decides refresh; say in the tables of this file how to use it"
        )
        assert all(type(setting.chosen[0]) is CACHES[name] for setting in table[name])


@settings(EVERYTHING)
def test_a_cache_that_recomputes_everything_is_no_cache(
    chosen: tuple[Strategy, ...], kind: str, toy: Toy, prompts, seeds
) -> None:
    more = (TopK(4), CFG(1.5)) if kind == "full shifted" else (Threshold(0.2), EndOfText())
    cache, *others = beside(chosen, *more)
    tokens, mask = prompts(7, 4, 6)
    got, want = (
        decode(
            toy(**MODELS[kind]), tokens, LENGTH, [c, *others], mask=mask, generator=seeds(0, 1, 2)
        )
        for c in (cache, uncached(cache))
    )
    assert got.tokens.equal(want.tokens)
    assert got.history.step.equal(want.history.step)
    torch.testing.assert_close(got.history.confidence, want.history.confidence)


@settings(SMALL)
def test_four_rows_are_what_they_are_alone(
    chosen: tuple[Strategy, ...],
    kind: str,
    toy: Toy,
    watch,
    prompts,
    seeds,
    request: pytest.FixtureRequest,
) -> None:
    steady = kind.endswith("shifted")
    more = (Blocks(3), TopK(7)) if steady else (Blocks(5), Threshold(0.25), EndOfText())
    model, sizes, strategies = toy(**MODELS[kind]), (7, 3, 6, 5), beside(chosen, *more)
    tokens, mask = prompts(*sizes)
    canvas = torch.full((4, LENGTH), 2)
    canvas[2, :4], canvas[3, 6] = 9, 17  # rows that are ahead of the others
    forwards = watch(model)
    batch = decode(
        *(model, tokens, LENGTH, strategies),
        mask=mask,
        canvas=canvas,
        generator=seeds(8, 9, 10, 11),
    )
    assert batch.nfe == len(forwards)
    assert max(batch.forwards) <= 2 * LENGTH
    ends = set()
    for i, size in enumerate(sizes):
        alone = decode(
            *(model, tokens[i : i + 1, -size:], LENGTH, strategies),
            canvas=canvas[i : i + 1],
            generator=seeds(8 + i),
        )
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()
        assert batch.history.step[i].equal(alone.history.step[0])
        assert batch.forwards[i] == alone.nfe
        torch.testing.assert_close(
            batch.history.confidence[i], alone.history.confidence[0], rtol=1e-4, atol=1e-5
        )
        ends.add(alone.nfe)
    if any(isinstance(s, Threshold) for s in strategies):
        assert len(ends) > 1  # some finished early
