"""The contract of adapters: one embedding per item, without padding."""

from __future__ import annotations

import pytest
import torch

from adapters.mlp import MLP
from encoders.features import Features, Prepared

ITEMS = [Prepared("image", torch.zeros(3, 4, 4)) for _ in range(2)]


def test_each_item_gets_its_real_tokens_and_its_grid():
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    features = Features(torch.randn(2, 6, 3), mask, ((2, 3), (2, 2)))
    mlp = MLP(3, 5)
    first, second = mlp.embed(features, ITEMS)
    assert (first.tokens.shape, first.grid) == ((6, 5), (2, 3))
    assert (second.tokens.shape, second.grid) == ((4, 5), (2, 2))
    assert torch.equal(second.tokens, mlp(features).tokens[1, :4])


def test_several_rows_per_item_need_an_adapter_that_merges_them():
    features = Features(torch.randn(3, 4, 3), torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="3 rows of features for 2 items"):
        MLP(3, 5).embed(features, ITEMS)


def test_sizes_are_checked_against_the_tokens():
    tokens, mask = torch.randn(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)
    assert Features(tokens, mask, (2, 2)).sizes == ((2, 2), (2, 2))
    assert Features(tokens, mask, ((2, 2), (1, 4))).grid is None
    with pytest.raises(ValueError, match="do not hold 4 tokens"):
        Features(tokens, mask, (2, 3))
    with pytest.raises(ValueError, match="1 sizes for 2 items"):
        Features(tokens, mask, ((2, 2),))
