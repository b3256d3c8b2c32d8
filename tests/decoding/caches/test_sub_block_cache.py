import pytest
import torch
from torch import Tensor

from mmdlm.backbones.kv import KV
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.sub_block_cache import SubBlockCache
from mmdlm.decoding.commits.dynamic import Dynamic
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.plans.sub_blocks import SubBlocks
from mmdlm.model import MultimodalDLM

MASK, BLOCK = 2, 8
PROMPT = torch.randint(3, 50, (1, 16), generator=torch.Generator().manual_seed(4))


class ByHand:
    """The published loop for one row: whole blocks appended to a cache, parts rewritten inside."""

    def __init__(self, model: MultimodalDLM, prompt: Tensor, length: int) -> None:
        self.model, self.shift = model, int(model.spec.shift)
        self.tokens = prompt.tolist() + [MASK] * length
        self.known, self.kv = len(prompt), model.backbone.cache(1, len(self.tokens))

    def forward(self, start: int, stop: int, end: int) -> Tensor:
        """Logits [rows V] of a span that sees the blocks before it and what the cache holds."""
        kv: KV = self.kv
        kv.end = end
        block = torch.arange(end) // BLOCK
        mask = (block[start:stop, None] >= block[None])[None]
        x = self.model.backbone.tokens(torch.tensor([self.tokens[start:stop]]))
        at = torch.arange(start, stop)
        hidden = self.model.backbone(x, at[None], kv, mask, rows=slice(start, stop))
        logits = self.model.backbone.head(hidden)[0].double()
        logits[:, MASK] = -torch.inf
        return logits

    def commit(self, logits: Tensor, first: int, at: list[int], tau: float) -> None:
        """Writes what exceeds tau and the best one; `first` is the row of the first logits."""
        sure, best = (x.tolist() for x in logits.softmax(-1).max(-1))
        row = {i: i - self.shift - first for i in at}
        top = max(at, key=lambda i: (sure[row[i]], -i))
        for i in at:
            if sure[row[i]] > tau or i == top:
                self.tokens[i] = best[row[i]]

    def run(self, size: int, tau: float) -> list[int]:
        """The answer with its prompt."""
        tokens, total = self.tokens, len(self.tokens)
        if whole := self.known // BLOCK * BLOCK:
            self.forward(0, whole, whole)
        for start in range(whole, total, BLOCK):
            stop = min(start + BLOCK, total)
            if self.shift and tokens[start] == MASK:
                self.commit(self.forward(start - 1, start, start), start - 1, [start], tau)
            for first in range(start, stop, size):
                span, fresh = range(first, min(first + size, stop)), True
                while masked := [i for i in span if tokens[i] == MASK]:
                    if fresh or (self.shift and tokens[first] == MASK):
                        self.commit(self.forward(start, stop, stop), start, masked, tau)
                    else:
                        self.commit(self.forward(first, span.stop, stop), first, masked, tau)
                    fresh = False
            self.forward(start, stop, stop)
        return tokens


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("known", [5, 9, 10, 11, 14, 16])
def test_a_decode_with_the_cache_is_what_it_is_by_hand(known: int, shift: bool, toy) -> None:
    model = toy(attention="block_causal", block_size=BLOCK, shift=shift)
    prompt = PROMPT[:, :known]
    with torch.inference_mode():
        want = ByHand(model, prompt[0], 14).run(4, 0.2)
    got = decode(model, prompt, 14, [SubBlocks(4), SubBlockCache(), Dynamic(tau=0.2)])
    assert got.tokens[0].tolist() == want


def test_it_is_an_approximation(toy) -> None:
    model = toy(attention="block_causal", block_size=BLOCK, shift=True)
    cached, exact = (
        decode(model, PROMPT, 16, [SubBlocks(4), *more]) for more in ([SubBlockCache()], [])
    )
    assert not cached.tokens.equal(exact.tokens)


def test_only_the_part_is_computed_once_its_first_position_is_known(toy, watch) -> None:
    model = toy(attention="block_causal", block_size=BLOCK, shift=True)
    forwards = watch(model)
    decode(model, PROMPT[:, :8], 8, [SubBlocks(4), SubBlockCache()])
    seen = [(f.rows, f.tokens[0, 12].item() == MASK) for f in forwards]
    # The prompt, which scores position 8; the block when each part opens, and for the second part
    # until position 12 is known; the part.
    assert seen[:4] == [((0, 8), True), ((8, 16), True), ((8, 12), True), ((8, 12), True)]
    assert seen[4] == ((8, 16), True)
    assert [rows for rows, masked in seen[5:]] == [
        (8, 16) if masked else (12, 16) for _, masked in seen[5:]
    ]
    assert len(seen) == 8


def test_without_a_shift_the_block_is_computed_once_per_part(toy, watch) -> None:
    model = toy(attention="block_causal", block_size=BLOCK)
    forwards = watch(model)
    decode(model, PROMPT[:, :8], 8, [SubBlocks(4), SubBlockCache()])
    want = [(0, 16), *[(8, 12)] * 3, (8, 16), *[(12, 16)] * 3]
    assert [f.rows for f in forwards] == want


def test_with_full_attention_it_is_the_dual_cache(toy, watch) -> None:
    forwards = watch(toy())
    chosen = [Blocks(3), Threshold(0.3)]
    ours, dual = (decode(toy(), PROMPT, 9, [*chosen, c]) for c in (SubBlockCache(), DualCache()))
    assert ours.tokens.equal(dual.tokens)
    half = len(forwards) // 2
    assert [f.rows for f in forwards[:half]] == [f.rows for f in forwards[half:]]


def test_parts_of_a_whole_block_need_no_approximation(toy) -> None:
    model = toy(attention="block_causal", block_size=BLOCK, shift=True)
    for known in (5, 8, 11):
        cached, exact = (
            decode(model, PROMPT[:, :known], 14, [SubBlocks(BLOCK), Threshold(0.2), *more])
            for more in ([SubBlockCache()], [])
        )
        assert cached.tokens.equal(exact.tokens)
        torch.testing.assert_close(cached.history.confidence, exact.history.confidence)


def test_guidance_has_a_cache_of_its_own(toy) -> None:
    model = toy(attention="block_causal", block_size=4)
    prompt = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
    chosen = [SubBlocks(2), SubBlockCache(), CFG(1.0)]
    batch = decode(model, prompt, 7, chosen, mask=mask)
    for i, known in enumerate((7, 5)):
        alone = decode(model, prompt[i : i + 1, -known:], 7, chosen)
        assert batch.tokens[i, -7:].tolist() == alone.tokens[0, -7:].tolist()
