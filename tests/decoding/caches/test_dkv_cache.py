from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.caches.dkv_cache import DKVCache
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.session import Session
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.layout import from_tokens

MASK, P, L = 2, 4, 14
PROMPT = torch.tensor([[3, 4, 5, 6]])
CACHES = [
    (DKVCache(every=4), False),
    (DKVCache(every=3), False),
    (DKVCache(every=8), False),
    (DKVCache(every=4, variant="un"), True),
    (DKVCache(every=4, variant="un_right"), True),
    (DKVCache(every=3, prefill=True), False),
    (DKVCache(every=3, prefill=True), True),
    (DKVCache(prefill=True, decode=False), False),
    (DKVCache(prefill=True, decode=False), True),
]


def indices(rows: tuple[int, int] | Tensor, row: int = 0) -> list[int]:
    """The positions a forward computed, each once."""
    return list(range(*rows)) if isinstance(rows, tuple) else sorted(set(rows[row].tolist()))


def policy(
    cache: DKVCache, shift: bool, inputs: list[list[int]], starts: list[int], prompt: int = P
) -> Iterator[list[int]]:
    """The positions to compute in each step, from what the canvas held at its start.

    Args:
        cache: the settings.
        shift: position p scores the token at p + 1.
        inputs: ids of the canvas before each step.
        starts: the first step of each block.
        prompt: positions before the answer.
    """
    for i, now in enumerate(inputs):
        at = i - max(s for s in starts if s <= i)
        rows = set(range(len(now)))
        if cache.decode and at % cache.every and not (at == 1 and not shift):
            known = {
                p for p in rows if now[p] != MASK and inputs[i - 1][p] != MASK
            }  # and not taken back
            if not shift:
                rows -= known
            elif cache.variant == "un":
                rows -= {p for p in rows if (p + 1) % len(now) in known}
            else:
                both = {p for p in rows if p in known and p + 1 in known}
                rows -= both | ({len(now) - 1} if len(now) - 2 in both else set())
        if cache.prefill and i:
            rows -= set(range(prompt - shift))
        yield sorted(rows)


@pytest.mark.parametrize(("cache", "shift"), CACHES)
@pytest.mark.parametrize("more", [[TopK()], [TopK(5)], [Blocks(5), Threshold(0.2)]], ids=str)
def test_every_step_is_what_it_is_by_hand(cache, shift, more, toy, watch) -> None:
    """The positions of each step, and its logits from keys and values that were kept by hand."""
    model = toy(shift=shift)
    forwards = watch(model)
    got = decode(model, PROMPT, L - P, [cache, *more])
    steps, size = got.history.step[0], 5 if len(more) > 1 else L - P
    starts = [int(steps[i : i + size].min()) for i in range(0, L - P, size)]
    inputs = [f.tokens[0].tolist() for f in forwards]
    want = list(policy(cache, shift, inputs, starts))
    assert [indices(f.rows) for f in forwards] == want
    assert got.nfe == len(forwards)
    kv = model.backbone.cache(1, L)
    for step, rows in zip(list(forwards), want, strict=True):
        sequence = from_tokens(step.tokens, None, "full", None)
        at, read = torch.tensor([rows]), (step.tokens[0] == MASK).nonzero()[:, 0]
        read = read[torch.isin(read - int(shift), at[0])]
        logits = torch.zeros(1, L, 50)
        logits[:, read] = model.run(sequence, at, read[None], kv, None, None)
        torch.testing.assert_close(step.logits, step.scored(logits))


@pytest.mark.parametrize("shift", [False, True])
def test_with_a_threshold_every_row_of_a_batch_has_its_own_positions(
    shift: bool, toy, watch, prompts
) -> None:
    model, cache, sizes = toy(shift=shift), DKVCache(every=5), (7, 4, 6, 5)
    tokens, mask = prompts(*sizes)
    forwards = watch(model)
    got = decode(model, tokens, 12, [cache, Threshold(0.2)], mask=mask)
    for b, size in enumerate(sizes):
        mine = [(f, i) for f in forwards for i, x in enumerate(f.tokens) if x[:7].equal(tokens[b])]
        assert len(mine) == got.forwards[b]
        inputs = [f.tokens[i, 7 - size :].tolist() for f, i in mine]
        for (f, i), want in zip(mine, policy(cache, shift, inputs, [0], size), strict=True):
            assert [p - 7 + size for p in indices(f.rows, i) if p >= 7 - size] == want
    counts = [(f.tokens[:, 7:] != MASK).sum(1).unique().numel() for f in forwards]
    assert max(counts) > 1  # rows with other numbers of known tokens, side by side


@pytest.mark.parametrize("variant", ["un", "un_right"])
def test_a_shorter_answer_beside_a_longer_one_computes_what_it_computes_alone(
    variant, toy, watch
) -> None:
    """The last position of a shifted family scores nothing, also where padding follows it."""
    model, chosen = toy(shift=True), [DKVCache(every=5, variant=variant), Threshold(0.2)]
    found, prompt, canvas = [], torch.tensor([9, 8, 7, 6]), torch.full((9,), MASK)
    canvas[-1] = 9  # known before the position that is computed with it in "un_right"
    for longer in (False, True):
        forwards, session = watch(model), Session(model, chosen)
        session.add(prompt, 9, canvas=canvas)
        if longer:
            session.add(torch.tensor([3, 4]), 12)
        while session.keys:
            session.step()
        mine = [(f, i) for f in forwards for i, x in enumerate(f.tokens) if x[:4].equal(prompt)]
        found.append([[p for p in indices(f.rows, i) if p < 13] for f, i in mine])
    assert found[0] == found[1]
    assert (12 in found[0][1]) == (variant == "un_right")


@dataclass(frozen=True)
class TakenBack(Strategy):
    """Makes the position filled first a mask again, once it has been kept for a step."""

    def revise(self, view: View) -> Tensor:
        again = torch.zeros_like(view.masked)
        again[:, view.prompt :] = (view.commit_step == 0) & (view.step == 3)[:, None]
        return again


def test_a_token_that_was_taken_back_is_computed_again(toy, watch) -> None:
    forwards = watch(toy())
    got = decode(toy(), PROMPT, L - P, [DKVCache(every=20), TakenBack()])
    inputs = [f.tokens[0].tolist() for f in forwards]
    back = [p for p in range(L) if inputs[3][p] != MASK and inputs[4][p] == MASK]
    assert len(back) == 1
    assert [back[0] in indices(f.rows) for f in forwards[2:5]] == [False, False, True]
    assert [indices(f.rows) for f in forwards] == list(policy(DKVCache(20), False, inputs, [0]))
    assert got.nfe == len(forwards) == L - P + 1


def test_the_first_steps_of_a_block_cost_full_passes(toy, watch) -> None:
    for shift, full in ((False, 2), (True, 1)):
        model = toy(shift=shift)
        forwards = watch(model)
        decode(model, PROMPT, 10, [Blocks(5), DKVCache(every=99)])
        whole = [len(indices(f.rows)) == L for f in forwards]
        assert whole == ([True] * full + [False] * (5 - full)) * 2


def test_it_is_an_approximation(toy) -> None:
    plain = decode(toy(), PROMPT, 10, [TopK()])
    for cache in (DKVCache(), DKVCache(prefill=True), DKVCache(prefill=True, decode=False)):
        cached = decode(toy(), PROMPT, 10, [cache])
        assert not torch.allclose(cached.history.confidence, plain.history.confidence)


@dataclass(frozen=True)
class Editor(Strategy):
    """Edits nothing."""

    def edit(self, view: View) -> Tensor:
        return torch.zeros_like(view.open)


def test_what_cannot_work_is_refused(toy) -> None:
    with pytest.raises(
        ValueError, match="DKVCache cannot be combined with Editor: DKVCache requires"
    ):
        decode(toy(), PROMPT, 4, [DKVCache(), Editor()])
    with pytest.raises(ValueError, match="DKVCache.every is 0"):
        DKVCache(every=0)
    with pytest.raises(ValueError, match="keeps nothing; expected prefill=True"):
        DKVCache(decode=False)
    with pytest.raises(ValueError, match="variant is 'right', expected 'un' or 'un_right'"):
        DKVCache(variant="right")
