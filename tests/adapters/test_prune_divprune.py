"""DivPrune: published indices, a slow oracle, masks and order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from adapters.adapter import Adapter
from adapters.mlp import MLP
from adapters.pool import Pool
from adapters.prune_divprune import DivPrune
from encoders.features import Features

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "divprune.safetensors"


class Same(Adapter):
    """The identity adapter."""

    def forward(self, features: Features, query: Tensor | None = None) -> Features:
        return features


def full(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


def oracle(tokens: Tensor, count: int) -> list[int]:
    """Selected indices of one row [N D], in the order of selection."""
    distance = [[1 - float(functional.cosine_similarity(a, b, 0)) for b in tokens] for a in tokens]
    places = range(len(tokens))
    first = max(places, key=lambda i: min([distance[i][j] for j in places if j != i] or [0]))
    picks = [first]
    while len(picks) < count:
        rest = [i for i in places if i not in picks]
        picks.append(max(rest, key=lambda i: min(distance[i][j] for j in picks)))
    return picks


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_divprune_picks_the_published_indices(share):
    golden = load_file(GOLDEN)
    tokens = golden["tokens"][:1]
    picked, kept = DivPrune(24, 24, keep=share, order="picked").select(tokens, full(tokens))
    assert kept.all()
    assert torch.equal(picked[0], golden[f"divprune.{share}"])
    ordered, _ = DivPrune(24, 24, keep=share).select(tokens, full(tokens))
    assert torch.equal(ordered[0], golden[f"divprune.{share}"].sort().values)


def test_divprune_equals_a_loop_in_a_masked_batch():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(5, 17, 6, generator=generator)
    mask = torch.rand(5, 17, generator=generator) < 0.6
    mask[3] = False
    mask[4] = False
    mask[4, 9] = True
    dirty = torch.where(mask[:, :, None], tokens, torch.nan)
    picked, kept = DivPrune(6, 6, keep=0.4, order="picked").select(dirty, mask)
    for row in range(5):
        places = mask[row].nonzero()[:, 0]
        count = min(max(round(0.4 * len(places)), 1), len(places))
        assert kept[row].tolist() == [n < count for n in range(kept.shape[1])]
        if count:
            expected = places[oracle(tokens[row, places], count)]
            assert torch.equal(picked[row, :count], expected)


def test_divprune_row_alone_equals_row_in_a_batch():
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(3, 12, 6, generator=generator)
    mask = full(tokens)
    mask[1, 7:] = False
    adapter = DivPrune(6, 8, keep=0.5)
    batch = adapter(Features(tokens, mask))
    for row in range(3):
        count = int(mask[row].sum())
        single = adapter(Features(tokens[row : row + 1, :count], mask[row : row + 1, :count]))
        real = batch.tokens[row, batch.mask[row]]
        torch.testing.assert_close(real, single.tokens[0, single.mask[0]])


@pytest.mark.parametrize("keep", [1.0, 9, 20])
def test_divprune_keeping_all_is_the_identity(keep):
    given = Features(torch.randn(2, 9, 4), torch.ones(2, 9, dtype=torch.bool), (3, 3))
    assert DivPrune(4, 4, inner=Same, keep=keep)(given) is given


def test_divprune_keeps_a_count_in_original_order():
    tokens = torch.randn(2, 9, 4)
    out = DivPrune(4, 4, inner=Same, keep=3)(Features(tokens, full(tokens), (3, 3)))
    assert out.tokens.shape == (2, 3, 4)
    assert out.grid is None
    for row in range(2):
        places = [tokens[row].tolist().index(token) for token in out.tokens[row].tolist()]
        assert places == sorted(places)
        assert sorted(places) == sorted(oracle(tokens[row], 3))


def test_divprune_never_picks_a_token_twice_among_equal_ones():
    tokens = torch.ones(1, 6, 4)
    picked, kept = DivPrune(4, 4, keep=5).select(tokens, full(tokens))
    assert kept.all()
    assert len(set(picked[0].tolist())) == 5


def test_divprune_wraps_any_adapter_and_passes_gradients():
    adapter = DivPrune(3, 5, inner=Pool, keep=0.5)
    tokens = torch.randn(2, 16, 3)
    out = adapter(Features(tokens, full(tokens), (4, 4)))
    assert out.tokens.shape == (2, 2, 5)
    out.tokens.square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in adapter.parameters())
    assert isinstance(DivPrune(3, 5).inner, MLP)


@pytest.mark.parametrize("keep", [0, 0.0, -1, 1.5])
def test_divprune_rejects_invalid_budgets(keep):
    with pytest.raises(ValueError, match="keep="):
        DivPrune(3, 5, keep=keep)


def test_divprune_rejects_invalid_orders():
    with pytest.raises(ValueError, match="order is 'random'"):
        DivPrune(3, 5, order="random")
