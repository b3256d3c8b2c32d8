"""Pool: a slow oracle for each kind, masks (parity with LaViDa: tests/encoders/test_vit.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adapters.mlp import MLP
from adapters.pool import Pool
from encoders.features import Features


def plain(kind: str, width: int, factor: int = 2) -> Pool:
    """A pool with an identity projector."""
    pool = Pool(width, width, kind=kind, factor=factor, layers=1)
    if kind == "concat":
        pool = Pool(width, width * factor, kind=kind, factor=factor, layers=1)
    nn.init.eye_(pool.project.layers[0].weight)
    nn.init.zeros_(pool.project.layers[0].bias)
    return pool


def features(rows: int, columns: int, width: int = 3, batch: int = 2) -> Features:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    tokens = torch.randn(batch, rows * columns, width, generator=generator)
    mask = torch.ones(batch, rows * columns, dtype=torch.bool)
    return Features(tokens, mask, (rows, columns))


def windows(image: Tensor, real: Tensor, factor: int, reduce) -> Tensor:
    """[B y x D]: `reduce` over the real tokens of each full window, zeros where there are none."""
    batch, rows, columns, width = image.shape
    out = torch.zeros(batch, rows // factor, columns // factor, width)
    for b in range(batch):
        for y in range(rows // factor):
            for x in range(columns // factor):
                cells = [
                    image[b, y * factor + i, x * factor + j]
                    for i in range(factor)
                    for j in range(factor)
                    if real[b, y * factor + i, x * factor + j]
                ]
                if cells:
                    out[b, y, x] = reduce(torch.stack(cells))
    return out


@pytest.mark.parametrize(("rows", "columns", "factor"), [(4, 4, 2), (5, 7, 2), (7, 9, 3)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["average", "max"])
def test_window_pooling_equals_a_loop(kind, masked, rows, columns, factor):
    given = features(rows, columns)
    mask = given.mask.clone()
    if masked:
        mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    tokens = torch.where(mask[:, :, None], given.tokens, torch.nan)
    out = plain(kind, 3, factor)(Features(tokens, mask, given.grid))
    reduce = {"average": lambda cells: cells.mean(0), "max": lambda cells: cells.amax(0)}[kind]
    expected = windows(
        given.tokens.view(2, rows, columns, 3), mask.view(2, rows, columns), factor, reduce
    )
    assert out.grid == (rows // factor, columns // factor)
    torch.testing.assert_close(out.tokens, expected.flatten(1, 2), atol=1e-5, rtol=1e-5)
    anywhere = windows(
        mask.view(2, rows, columns, 1).float(),
        mask.view(2, rows, columns),
        factor,
        lambda cells: cells.amax(0),
    )
    assert torch.equal(out.mask, anywhere.flatten(1) > 0)


def bilinear(image: Tensor, rows: int, columns: int) -> Tensor:
    """[y x D] of a [Y X D] image, half-pixel centres, clamped at the border."""
    height, width = image.shape[:2]
    out = torch.zeros(rows, columns, image.shape[2])
    for y in range(rows):
        for x in range(columns):
            v = max((y + 0.5) * height / rows - 0.5, 0)
            u = max((x + 0.5) * width / columns - 0.5, 0)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a, b = v - top, u - left
            out[y, x] = (1 - a) * ((1 - b) * image[top, left] + b * image[top, right]) + a * (
                (1 - b) * image[bottom, left] + b * image[bottom, right]
            )
    return out


@pytest.mark.parametrize(("rows", "columns", "factor"), [(27, 27, 2), (5, 7, 2), (8, 8, 4)])
def test_bilinear_resizes_to_the_ceiling_without_antialias(rows, columns, factor):
    given = features(rows, columns, batch=1)
    out = plain("bilinear", 3, factor)(given)
    small = (-(-rows // factor), -(-columns // factor))
    assert out.grid == small
    assert out.mask.all()
    expected = bilinear(given.tokens.view(rows, columns, 3), *small)
    torch.testing.assert_close(out.tokens[0], expected.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_bilinear_never_reads_masked_tokens():
    given = features(4, 4, batch=1)
    mask = given.mask.clone()
    mask[0, 12:] = False
    dirty = torch.where(mask[:, :, None], given.tokens, torch.nan)
    out = plain("bilinear", 3)(Features(dirty, mask, (4, 4)))
    assert out.tokens.isfinite().all()
    assert out.mask.all()
    expected = given.tokens.view(1, 4, 4, 3)[:, 2, :2].mean(1)
    torch.testing.assert_close(out.tokens[:, 2], expected)


def test_projector_comes_before_grid_pooling():
    pool, given = Pool(3, 6, kind="max"), features(4, 4)
    projected = pool.project(given)
    out = plain("max", 6)(projected)
    torch.testing.assert_close(pool(given).tokens, out.tokens)
    assert isinstance(pool.project, MLP)


@pytest.mark.parametrize("count", [1, 3, 6, 7])
def test_concat_joins_neighbours_and_pads_with_zeros(count):
    tokens = torch.randn(2, count, 3)
    out = plain("concat", 3, factor=3)(Features(tokens, torch.ones(2, count, dtype=torch.bool)))
    padded = torch.cat([tokens, torch.zeros(2, -count % 3, 3)], dim=1)
    expected = torch.stack(
        [
            torch.cat([padded[:, 3 * n + j] for j in range(3)], dim=-1)
            for n in range(padded.shape[1] // 3)
        ],
        dim=1,
    )
    torch.testing.assert_close(out.tokens, expected)
    assert out.mask.all()
    assert out.grid is None


def test_concat_row_alone_equals_row_padded_in_a_batch():
    pool = Pool(3, 5, kind="concat", factor=4)
    short, long = torch.randn(1, 6, 3), torch.randn(1, 13, 3)
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[0, :6] = mask[1] = True
    padded = torch.cat([torch.cat([short, torch.full((1, 7, 3), torch.nan)], dim=1), long])
    batch = pool(Features(padded, mask))
    for row, alone in enumerate((short, long)):
        single = pool(Features(alone, torch.ones(alone.shape[:2], dtype=torch.bool)))
        count = single.tokens.shape[1]
        assert batch.mask[row].tolist() == [n < count for n in range(batch.mask.shape[1])]
        torch.testing.assert_close(batch.tokens[row, :count], single.tokens[0])


@pytest.mark.parametrize("kind", ["bilinear", "average", "max", "concat"])
def test_pool_row_alone_equals_row_in_a_batch(kind):
    pool, given = Pool(3, 5, kind=kind), features(5, 4, batch=3)
    batch = pool(given)
    for row in range(3):
        single = pool(Features(given.tokens[row : row + 1], given.mask[:1], given.grid))
        torch.testing.assert_close(single.tokens[0], batch.tokens[row])


@pytest.mark.parametrize("kind", ["bilinear", "average", "max", "concat"])
def test_pool_with_factor_1_only_projects(kind):
    pool, given = Pool(3, 5, kind=kind, factor=1), features(3, 4)
    torch.testing.assert_close(pool(given).tokens, pool.project(given).tokens)


@pytest.mark.parametrize("kind", ["bilinear", "average", "max", "concat"])
def test_pool_gradients_are_finite_with_a_fully_masked_row(kind):
    pool, given = Pool(3, 5, kind=kind), features(4, 4)
    mask = given.mask.clone()
    mask[0] = False
    out = pool(Features(given.tokens, mask, given.grid))
    assert not out.mask[0].any()
    out.tokens.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in pool.parameters())


def test_pool_rejects_invalid_arguments():
    with pytest.raises(ValueError, match="kind is 'mean'"):
        Pool(3, 5, kind="mean")
    with pytest.raises(ValueError, match="factor is 0"):
        Pool(3, 5, factor=0)
    sequence = Features(torch.randn(1, 4, 3), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs a grid"):
        Pool(3, 5)(sequence)
    with pytest.raises(ValueError, match="smaller than factor=3"):
        Pool(3, 5, kind="average", factor=3)(features(2, 4))
