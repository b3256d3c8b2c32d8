"""Pixel shuffle: order of joined neighbours, and independence of masked tokens."""

import pytest
import torch

from adapters.pixel_shuffle import PixelShuffle
from encoders.features import Features


def transparent(width, factor):
    """An adapter with an identity projector."""
    adapter = PixelShuffle(width, width * factor**2, factor, layers=1)
    with torch.no_grad():
        linear = adapter.project.layers[0]
        linear.weight.copy_(torch.eye(width * factor**2))
        linear.bias.zero_()
    return adapter


@pytest.mark.parametrize(("rows", "columns", "factor"), [(4, 6, 2), (6, 3, 3), (2, 2, 1)])
def test_neighbours_are_joined_row_by_row(rows, columns, factor):
    tokens = torch.randn(2, rows * columns, 5)
    mask = torch.ones(2, rows * columns, dtype=torch.bool)
    out = transparent(5, factor)(Features(tokens, mask, (rows, columns)))
    assert out.grid == (rows // factor, columns // factor)
    assert out.mask.all()
    for b in range(2):
        for y in range(rows // factor):
            for x in range(columns // factor):
                parts = [
                    tokens[b, (y * factor + i) * columns + x * factor + j]
                    for i in range(factor)
                    for j in range(factor)
                ]
                joined = out.tokens[b, y * (columns // factor) + x]
                torch.testing.assert_close(joined, torch.cat(parts), rtol=0, atol=1e-6)


def test_masked_tokens_are_never_read():
    tokens, mask = torch.randn(1, 8, 3), torch.ones(1, 8, dtype=torch.bool)
    mask[0, [0, 2, 3, 6, 7]] = False  # on a grid of 2 x 4: one of four parts, then all of them
    adapter = PixelShuffle(3, 7)
    out = adapter(Features(tokens, mask, (2, 4)))
    spoilt = torch.where(mask[:, :, None], tokens, float("nan"))
    again = adapter(Features(spoilt, mask, (2, 4)))
    assert out.mask.tolist() == again.mask.tolist() == [[True, False]]
    assert torch.equal(out.tokens, again.tokens)
    assert out.tokens.shape == (1, 2, 7)


@pytest.mark.parametrize("grid", [None, (1, 6), (2, 3)])
def test_grids_that_do_not_divide_are_rejected(grid):
    features = Features(torch.zeros(1, 6, 3), torch.ones(1, 6, dtype=torch.bool), grid)
    with pytest.raises(ValueError, match="expected sides divisible by factor=2.*patch size"):
        PixelShuffle(3, 4)(features)


def test_factor_must_be_positive():
    with pytest.raises(ValueError, match="factor=0"):
        PixelShuffle(3, 4, factor=0)
