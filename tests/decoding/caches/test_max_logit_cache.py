"""Max-logit cache: what is computed, and that computing everything changes nothing."""

import torch

from mmdlm.decoding.caches.max_logit_cache import MaxLogitCache
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.strategy import Strategy

PROMPT = torch.arange(3, 9)[None]


class Watch(Strategy):
    """Notes how many positions each step computes."""

    def __init__(self) -> None:
        object.__setattr__(self, "counts", [])

    def observe(self, view, logits) -> None:
        self.counts.append(int(view.refresh.compute.sum()))


def test_only_positions_of_low_confidence_are_computed(toy) -> None:
    watch = Watch()
    cache = MaxLogitCache(ratio=0.75, warmup=0.2, interval=4, steps=10)
    found = decode(toy(), PROMPT, 10, [cache, TopK(10), watch])
    assert found.nfe == 10
    assert [count == 16 for count in watch.counts] == [cache.is_full(i) for i in range(10)]
    # The 25 % quantile of 16 values lies between the 4th and the 5th.
    assert {count for i, count in enumerate(watch.counts) if not cache.is_full(i)} == {4}


def test_reusing_nothing_gives_the_plain_decode(toy) -> None:
    for shift in (False, True):
        model = toy(shift=shift)
        plain = decode(model, PROMPT, 10)
        cached = decode(model, PROMPT, 10, [MaxLogitCache(ratio=0.0, warmup=0.0, interval=100)])
        assert torch.equal(cached.tokens, plain.tokens)
        torch.testing.assert_close(cached.history.confidence, plain.history.confidence)


def test_rows_of_other_lengths_do_not_change_a_row(toy) -> None:
    cache = [MaxLogitCache(ratio=0.6, warmup=0.0, interval=3, steps=12)]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT[:, :3]], 1)
    mask = torch.cat([torch.ones(1, 6), torch.tensor([[0.0, 0, 0, 1, 1, 1]])]).bool()
    both = decode(toy(), torch.cat([PROMPT, padded]), 9, cache, mask=mask)
    assert torch.equal(both.tokens[0], decode(toy(), PROMPT, 9, cache).tokens[0])
    assert torch.equal(both.tokens[1, 6:], decode(toy(), PROMPT[:, :3], 9, cache).tokens[0, 3:])
