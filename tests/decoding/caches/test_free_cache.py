import pytest
import torch

from mmdlm.decoding.caches.free_cache import FreeCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.layout import from_tokens

MASK = 2
PROMPT = torch.tensor([[3, 4, 5, 6]])


@pytest.mark.parametrize(
    ("cache", "shift", "want"),
    [
        (FreeCache(), False, [(0, 10), (4, 10), (4, 10), (7, 10), (7, 10), (7, 10)]),
        (FreeCache(), True, [(0, 10), (3, 10), (3, 10), (6, 10), (6, 10), (6, 10)]),
        (FreeCache(every=2), False, [(0, 10), (4, 10), (0, 10), (0, 10), (7, 10), (0, 10)]),
    ],
)
def test_only_the_first_step_is_a_full_pass(cache, shift, want, toy, watch) -> None:
    model = toy(shift=shift)
    forwards = watch(model)
    got = decode(model, PROMPT, 6, [Blocks(3), cache])
    assert [f.rows for f in forwards] == want
    assert got.nfe == 6


@pytest.mark.parametrize("more", [[TopK()], [TopK(4)], [Threshold(0.2)]], ids=str)
def test_a_block_keeps_what_its_last_step_computed(more, toy, watch) -> None:
    """Keys of finished blocks, by hand: of a forward that saw the canvas of their last step."""
    model = toy()
    forwards = watch(model)
    got = decode(model, PROMPT, 9, [Blocks(3), FreeCache(), *more])
    steps = got.history.step[0].view(3, 3).amax(1).tolist()
    for i, f in enumerate(list(forwards)):
        block = sum(step < i for step in steps)
        start, kv = 4 + 3 * block, model.backbone.cache(1, 13)
        # The prompt of the first step, each block of its last, then the rest of now.
        passes = [(forwards[0].tokens, 0)]
        passes += [(forwards[steps[n]].tokens, 4 + 3 * n) for n in range(block)]
        logits = torch.zeros(1, 13, 50)
        for tokens, first in [*passes, (f.tokens, start if i else 0)]:
            sequence = from_tokens(tokens, None, "full", None)
            rows = slice(first, 13)
            logits[:, rows] = model.run(sequence, rows, rows, kv, None, None)
        assert f.rows == (start if i else 0, 13)
        torch.testing.assert_close(f.logits, f.scored(logits))


def test_in_one_block_with_a_prompt_that_is_final_nothing_is_lost(toy) -> None:
    model = toy(attention="prefix")
    free, plain = (decode(model, PROMPT, 9, [Threshold(0.2), *c]) for c in ([FreeCache()], []))
    assert free.tokens.equal(plain.tokens)
    torch.testing.assert_close(free.history.confidence, plain.history.confidence)


def test_it_is_an_approximation(toy) -> None:
    chosen = [Blocks(3), TopK()]
    free, renewed = (decode(toy(), PROMPT, 9, [*chosen, c]) for c in (FreeCache(), PrefixCache()))
    # In the first block they do the same.
    torch.testing.assert_close(free.history.confidence[:, :3], renewed.history.confidence[:, :3])
    assert not torch.allclose(free.history.confidence, renewed.history.confidence)


def scores(forward, row: int) -> dict[int, torch.Tensor]:
    """The logits of each position that a forward scored, counted from the end of the canvas."""
    read, length = forward.read, forward.tokens.shape[1]
    at = range(*read) if isinstance(read, tuple) else read[row].tolist()
    return {p - length: forward.logits[row, i] for i, p in enumerate(at)}


def test_a_row_begins_its_second_block_while_another_is_in_its_first(toy, watch, prompts) -> None:
    """Each row goes on when its block is full, and keeps what its last step computed there."""
    tokens, mask = prompts(6, 4)
    canvas = torch.full((2, 8), MASK)
    canvas[1, 1:4] = torch.tensor([7, 8, 9])
    forwards, chosen = watch(toy()), [Blocks(4), FreeCache()]
    batch = decode(toy(), tokens, 8, chosen, mask=mask, canvas=canvas)
    mine = [(f, i) for f in forwards for i, row in enumerate(f.tokens) if row[:6].equal(tokens[1])]
    forwards.clear()
    alone = decode(toy(), tokens[1:, 2:], 8, chosen, canvas=canvas[1:])
    assert batch.forwards == (8, 5)
    assert alone.nfe == 5
    for (f, i), one in zip(mine, forwards, strict=True):
        got, want = scores(f, i), scores(one, 0)
        assert set(got) == set(want)
        for p in want:
            torch.testing.assert_close(got[p], want[p])
    assert batch.tokens[1, 2:].tolist() == alone.tokens[0].tolist()


def test_blocks_of_the_models_own_are_kept_too(toy, watch) -> None:
    """A prompt of 5 and blocks of 4: the first holds one token of the prompt."""
    kind = {"attention": "block_causal", "block_size": 4}
    forwards = watch(toy(**kind))
    decode(toy(**kind), torch.arange(3, 8)[None], 7, [FreeCache(), TopK(3)])
    assert [f.rows for f in forwards] == [(0, 8), (5, 8), (8, 12), (8, 12)]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="FreeCache.every is 0"):
        FreeCache(every=0)
