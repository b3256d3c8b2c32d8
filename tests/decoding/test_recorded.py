"""Compiled models: the tokens stay, whatever is recorded; on a CPU a tape stands for the graph."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from mmdlm.backbones import recorded
from mmdlm.decoding.caches.block_cache import BlockCache
from mmdlm.decoding.caches.dkv_cache import DKVCache
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.elastic_cache import ElasticCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.caches.prompt_once import PromptOnce
from mmdlm.decoding.caches.sub_block_cache import SubBlockCache
from mmdlm.decoding.commits.klass import KLASS
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.guidance.credit import Credit
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.state import DecodeState
from mmdlm.layout import Row, Turn
from mmdlm.model import MultimodalDLM

LENGTH = 8


class Tape(TorchDispatchMode):
    """Notes kernels with their arguments, and repeats them over the same memory: a CUDA graph.

    Like one, it knows nothing of Python: numbers, shapes and addresses are those of the recording.
    It also refuses what a graph refuses: to look at a value.
    """

    LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.LOOKS, f"{name} waits for the device"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            both = [x if isinstance(x, tuple | list) else (x,) for x in (result, again)]
            for old, new in zip(*both, strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tape]]:
    """Records on a CPU; the list holds what was recorded."""
    made: list[Tape] = []

    def record(forward: Callable[[], Tensor], device: torch.device) -> tuple[Callable, Tensor]:
        with Tape() as tape:
            logits = forward()
        made.append(tape)
        return tape.replay, logits

    monkeypatch.setattr(recorded, "record", record)
    monkeypatch.setattr(DecodeState, "thrifty", False)  # as on a GPU
    yield made
    torch._dynamo.reset()


@pytest.fixture
def compiled(toy) -> Callable[..., MultimodalDLM]:
    """compiled(attention=..., ...): a toy whose blocks are taken apart but run as they are."""

    def make(**given: object) -> MultimodalDLM:
        model = deepcopy(toy(**given))
        model.backbone.pool = recorded.Pool()
        return model

    return make


CASES = {
    "prefix cache": ([PrefixCache(), Blocks(4)], {}),
    "dual cache": ([DualCache(), Blocks(4)], {}),
    "dual cache, shifted": ([DualCache(), Blocks(4)], {"shift": True}),
    "two tokens a step": ([DualCache(), Blocks(4), TopK(4)], {}),
    "threshold": ([DualCache(), Blocks(4), Threshold(0.2)], {}),
    "guidance": ([CFG(1.0), PrefixCache(), Blocks(4)], {}),
    "prompt once": ([PromptOnce(dual=True), Blocks(4)], {"shift": True}),
    "prefix-LM": ([PrefixLM()], {}),
    "prefix model": ([], {"attention": "prefix"}),
    "own blocks": ([], {"attention": "block_causal", "block_size": 4}),
    "own blocks, stored": ([BlockCache()], {"attention": "block_causal", "block_size": 4}),
    "own blocks, sub": ([SubBlockCache()], {"attention": "block_causal", "block_size": 4}),
    "chosen rows": ([DKVCache()], {}),
    "history": ([Credit(), DualCache(), Blocks(4)], {}),
    "all logits kept": ([KLASS(), DualCache(), Blocks(4)], {}),
    "elastic": ([ElasticCache()], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_recording_changes_no_token(name: str, toy, compiled, prompts, tapes) -> None:
    strategies, given = CASES[name]
    plain, fast = toy(**given), compiled(**given)
    tokens, mask = prompts(9, 6, 3)
    for size in (9, 7, 9):  # other prompts in the same buffers
        part = slice(9 - size, None)
        want = decode(plain, tokens[:, part], LENGTH, strategies, mask=mask[:, part])
        got = decode(fast, tokens[:, part], LENGTH, strategies, mask=mask[:, part])
        assert got.tokens.equal(want.tokens)
        assert got.nfe == want.nfe
        assert got.history.step.equal(want.history.step)
    assert bool(tapes) == (name not in ("elastic",))


def test_rows_that_leave_take_their_keys_along(toy, compiled, prompts, tapes) -> None:
    strategies = [DualCache(), Blocks(4), Threshold(0.1)]
    tokens, mask = prompts(9, 6, 3)
    canvas = torch.full((3, LENGTH), 2)
    canvas[1, :6] = 7  # this row is done early
    given = {"mask": mask, "canvas": canvas}
    want = decode(toy(), tokens, LENGTH, strategies, **given)
    fast = compiled()
    for _ in range(3):
        got = decode(fast, tokens, LENGTH, strategies, **given)
        assert got.tokens.equal(want.tokens)
    sizes = {len(buffers.kv.keys[0]) for buffers in fast.backbone.pool.free}
    assert len(sizes) > 1  # of the whole batch, and of what was left
    assert len(fast.backbone.pool.free) <= recorded.MOST_BUFFERS


def test_what_a_broken_decode_leaves_behind_is_gone(toy, compiled, prompts, tapes) -> None:
    model, (tokens, mask) = compiled(), prompts(9, 6)
    strategies = [DualCache(), Blocks(4)]
    kept = model.backbone.embed.weight.clone()
    model.backbone.embed.weight[5:] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        decode(model, tokens, LENGTH, strategies, mask=mask)
    state = model.backbone.cache(2, 9 + LENGTH)
    state.keys[0].fill_(torch.nan)
    state.release()
    model.backbone.embed.weight.copy_(kept)
    want = decode(toy(), tokens[:, 3:], LENGTH, strategies, mask=mask[:, 3:])
    got = decode(model, tokens[:, 3:], LENGTH, strategies, mask=mask[:, 3:])
    assert got.tokens.equal(want.tokens)


def test_media_are_computed_as_they_are_and_text_behind_them_recorded(toy, compiled, tapes) -> None:
    plain, fast = toy(), compiled()
    picture = torch.randn(5, plain.spec.transformer.width)
    rows = [Row((picture,), (Turn(torch.tensor([4, 9, 11]), torch.tensor([], dtype=torch.long)),))]
    strategies = [DualCache(), Blocks(4)]
    for _ in range(2):
        want = decode(plain, plain.arrange(rows), LENGTH, strategies)
        assert decode(fast, fast.arrange(rows), LENGTH, strategies).tokens.equal(want.tokens)
    assert tapes


def test_a_shape_is_recorded_when_it_comes_again(compiled, prompts, tapes) -> None:
    model, (tokens, mask) = compiled(), prompts(6)
    strategies = [DualCache(), Blocks(4)]
    decode(model, tokens, 4, strategies, mask=mask)
    assert len(tapes) == 1  # the first of the three cached steps ran as it is
    for size in (5, 4):  # the length of the prompt does not matter
        decode(model, tokens[:, -size:], 4, strategies, mask=mask[:, -size:])
        assert len(tapes) == 1
    decode(model, tokens[:, -3:], LENGTH, strategies, mask=mask[:, -3:])
    assert len(tapes) == 2  # nor which block it is, but the pass that opens one came twice
    decode(model, tokens[:, -2:], 6, [DualCache(), Blocks(6)], mask=mask[:, -2:])
    assert len(tapes) == 3


def test_moving_or_changing_weights_forgets_or_follows(toy, compiled, prompts, tapes) -> None:
    model, (tokens, mask) = compiled(), prompts(6)
    strategies = [DualCache(), Blocks(4)]
    before = decode(model, tokens, LENGTH, strategies, mask=mask).tokens
    assert model.backbone.pool.free
    for weight in model.parameters():  # in place, as an optimizer does
        weight.mul_(-0.7)
    changed = deepcopy(model)
    assert not changed.backbone.pool.free
    got = decode(model, tokens, LENGTH, strategies, mask=mask).tokens
    assert got.equal(decode(changed, tokens, LENGTH, strategies, mask=mask).tokens)
    assert not got.equal(before)
    model.double()
    assert not model.backbone.pool.free
    assert decode(model, tokens, LENGTH, strategies, mask=mask).tokens.shape == before.shape


@pytest.mark.parametrize("shift", [False, True])
def test_all_blocks_share_what_is_compiled(shift: bool, toy, prompts, monkeypatch) -> None:
    monkeypatch.setattr(DecodeState, "thrifty", False)  # as on a GPU
    torch._dynamo.reset()
    counter = CompileCounter()
    model, (tokens, mask) = deepcopy(toy(shift=shift)), prompts(9, 6, 3)
    model.compile(backend=counter)
    strategies = [DualCache(), Blocks(4)]
    want = decode(toy(shift=shift), tokens, LENGTH, strategies, mask=mask).tokens
    assert decode(model, tokens, LENGTH, strategies, mask=mask).tokens.equal(want)
    # Before the attention, for all rows and in the last block for some, and behind it. In a
    # shifted family the first position of a block is scored alone, and one is a size of its own.
    count = 5 if shift else 3
    assert counter.frame_count == count
    for size in (8, 7, 5):
        decode(model, tokens[:, -size:], 4 * size, strategies, mask=mask[:, -size:])
    assert counter.frame_count == count
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiling_for_real_keeps_the_tokens(toy, prompts) -> None:
    torch._dynamo.reset()
    model, (tokens, mask) = deepcopy(toy()), prompts(9, 6)
    model.compile()
    strategies = [DualCache(), Blocks(4)]
    want = decode(toy(), tokens, LENGTH, strategies, mask=mask).tokens
    assert decode(model, tokens, LENGTH, strategies, mask=mask).tokens.equal(want)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_graphs_keep_the_tokens(name: str, toy, prompts) -> None:
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
