"""Compiled models: the tokens stay the same, and nothing is compiled again without need."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mmdlm.decoding.caches.dkv_cache import DKVCache
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.elastic_cache import ElasticCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.state import State
from mmdlm.layout import Row

LENGTH = 8
CASES = {
    "dual cache": ([DualCache(), Blocks(4)], {}),
    "guidance": ([CFG(1.0), PrefixCache(), Blocks(4)], {"shift": True}),
    "prefix-LM": ([PrefixLM()], {}),
    "chosen positions": ([DKVCache(), Threshold(0.2)], {}),
    "elastic": ([ElasticCache()], {}),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whole blocks are scored, and nothing that was compiled outlives the test."""
    monkeypatch.setattr(State, "score_masked_only", False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name",
    [
        "dual cache",
        "chosen positions",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("guidance", "prefix-LM", "elastic")
        ),
    ],
)
def test_compiling_changes_no_token(name: str, toy, prompts) -> None:
    strategies, given = CASES[name]
    plain = toy(**given)
    fast = deepcopy(plain)
    fast.compile(backend="eager")
    tokens, mask = prompts(9, 6, 3)
    want = decode(plain, tokens, LENGTH, strategies, mask=mask)
    got = decode(fast, tokens, LENGTH, strategies, mask=mask)
    assert got.tokens.equal(want.tokens)
    assert got.nfe == want.nfe
    assert got.history.step.equal(want.history.step)


def test_media_are_part_of_a_compiled_step(toy) -> None:
    plain = toy()
    fast = deepcopy(plain)
    fast.compile(backend="eager")
    image = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    sequence = plain.arrange([Row((image, torch.tensor([4, 9, 11])))])
    strategies = [PrefixCache(), Blocks(4)]
    want = decode(plain, sequence, LENGTH, strategies)
    assert decode(fast, sequence, LENGTH, strategies).tokens.equal(want.tokens)


def test_other_lengths_are_not_compiled_again(toy, prompts) -> None:
    counter = CompileCounter()
    model, (tokens, mask) = deepcopy(toy()), prompts(9, 6, 3)
    model.compile(backend=counter)
    strategies = [DualCache(), Blocks(4)]
    want = decode(toy(), tokens, LENGTH, strategies, mask=mask).tokens
    assert decode(model, tokens, LENGTH, strategies, mask=mask).tokens.equal(want)
    count = counter.frame_count
    assert count > 0
    for size in (8, 7, 5):
        decode(model, tokens[:, -size:], 4 * size, strategies, mask=mask[:, -size:])
    assert counter.frame_count == count


def test_a_copy_of_a_compiled_model_has_its_own_weights(toy, prompts) -> None:
    model, (tokens, _) = deepcopy(toy()), prompts(9)
    model.compile(backend="eager")
    strategies = [DualCache(), Blocks(4)]
    before = decode(model, tokens, LENGTH, strategies).tokens
    other = deepcopy(model)
    for weight in other.parameters():
        weight.mul_(-0.7)
    assert not decode(other, tokens, LENGTH, strategies).tokens.equal(before)
    assert decode(model, tokens, LENGTH, strategies).tokens.equal(before)


@pytest.mark.slow
def test_compiling_for_real_keeps_the_tokens(toy, prompts) -> None:
    model, (tokens, mask) = deepcopy(toy()), prompts(9, 6)
    model.compile()
    strategies = [DualCache(), Blocks(4)]
    want = decode(toy(), tokens, LENGTH, strategies, mask=mask).tokens
    assert decode(model, tokens, LENGTH, strategies, mask=mask).tokens.equal(want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_graphs_keep_the_tokens(name: str, toy, prompts) -> None:
    strategies, given = CASES[name]
    plain = deepcopy(toy(**given)).to("cuda").double()  # in which no two tokens are nearly equal
    fast = deepcopy(plain)
    fast.compile()
    tokens, mask = (x.to("cuda") for x in prompts(9, 6, 3))
    for size in (9, 7, 9):
        part = slice(9 - size, None)
        want = decode(plain, tokens[:, part], LENGTH, strategies, mask=mask[:, part])
        got = decode(fast, tokens[:, part], LENGTH, strategies, mask=mask[:, part])
        assert got.tokens.equal(want.tokens)
        assert got.nfe == want.nfe
