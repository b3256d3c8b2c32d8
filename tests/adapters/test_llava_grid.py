"""LlavaGrid: token counts, a slow oracle, gradients and errors.

Parity with LaViDa: tests/systems/test_lavida.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.llava_grid import LlavaGrid, unpad
from encoders.anyres import AnyRes, best_canvas, parse_pinpoints
from encoders.features import Features, Prepared

SELECTION = json.loads(
    (
        Path(__file__).parents[1] / "golden" / "vision" / "lavida_schedules" / "anyres.json"
    ).read_text()
)
LAVIDA = parse_pinpoints("[(384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152)]", 384)
LLADA_V = parse_pinpoints("(1x1),...,(6x6)", 384)


def features(views: int, side: int, width: int = 2, seed: int = 0) -> Features:
    tokens = torch.randn(views, side * side, width, generator=torch.Generator().manual_seed(seed))
    return Features(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), (side, side))


def image(size: tuple[int, int], grid: tuple[int, ...], views: int | None = None) -> Prepared:
    views = 1 + math.prod(grid) if views is None else views
    return Prepared("image", torch.zeros(views, 3, 4, 4), size, grid)


def identity(**options) -> LlavaGrid:
    """An adapter that projects nothing and whose newline is 9."""
    adapter = LlavaGrid(2, 2, layers=1, **options)
    with torch.no_grad():
        adapter.project.layers[0].weight.copy_(torch.eye(2))
        adapter.project.layers[0].bias.zero_()
        if hasattr(adapter, "newline"):
            adapter.newline.fill_(9.0)
    return adapter


@pytest.mark.parametrize("case", SELECTION, ids=lambda case: "x".join(map(str, case["size_wh"])))
def test_token_counts_equal_reference(case: dict) -> None:
    width, height = case["size_wh"]
    for name, side, canvases, options in (
        ("lavida", 27, LAVIDA, {"pool": "bilinear"}),
        ("llada_v", 27, LLADA_V, {"most_tiles": 4}),
    ):
        columns, rows = (pixels // 384 for pixels in best_canvas((width, height), canvases))
        item = image((height, width), (rows, columns))
        assert len(item.tensor) == case[name]["tiles"]
        with torch.no_grad():
            got = identity(**options).embed(features(len(item.tensor), side), [item])[0]
        assert len(got.tokens) == case[name]["tokens"]
        ends = (got.tokens == 9).all(1).nonzero()[:, 0]
        assert len(ends) == case[name].get("final_hw", case[name]["unpadded_hw"])[0]


def oracle(views: Tensor, side: int, item: Prepared, merge: str) -> list[list[float]]:
    """Merged tokens [N 2] by loops over single tokens; views [V N 2]."""
    out = [row.tolist() for row in views[0]]
    if merge == "flat":
        return [row.tolist() for view in views for row in view]
    if len(views) == 1:
        return out + [[9.0, 9.0]] * (merge == "spatial_unpad")
    height, width = item.size
    rows, columns = item.grid[0] * side, item.grid[1] * side
    top = left = 0
    if merge == "spatial_unpad":
        if width / height > columns / rows:
            top = (rows - int(height * (columns / width))) // 2
        else:
            left = (columns - int(width * (rows / height))) // 2
    for y in range(top, rows - top):
        for x in range(left, columns - left):
            tile = 1 + (y // side) * item.grid[1] + x // side
            out.append(views[tile][(y % side) * side + x % side].tolist())
        if merge == "spatial_unpad":
            out.append([9.0, 9.0])
    return out


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_merging_equals_loops_for_several_images_at_once(merge: str) -> None:
    side = 3
    items = [
        image((30, 50), (2, 2)),
        image((50, 20), (3, 1)),
        image((7, 7), (1, 3)),
        image((9, 9), (), views=1),
        Prepared("image", torch.zeros(3, 4, 4), (9, 9)),
    ]
    counts = [5, 4, 4, 1, 1]
    given = features(sum(counts), side)
    with torch.no_grad():
        got = identity(merge=merge).embed(given, items)
    for one, views, item in zip(got, given.tokens.split(counts), items, strict=True):
        expected = oracle(views, side, item, merge)
        torch.testing.assert_close(one.tokens, torch.tensor(expected), atol=1e-6, rtol=0)
    assert [one.grid for one in got[:3]] == [None] * 3
    assert got[3].grid == (None if merge == "spatial_unpad" else (3, 3))


@pytest.mark.parametrize(
    ("size", "left"),
    [
        ((10, 10), (8, 8)),
        ((5, 10), (4, 8)),
        ((10, 3), (8, 2)),
        ((4, 10), (4, 8)),
        ((1, 99), (0, 8)),
    ],
)
def test_unpad_cuts_equal_halves(size: tuple[int, int], left: tuple[int, int]) -> None:
    whole = torch.arange(64.0).view(1, 8, 8)
    got = unpad(whole, size)
    assert got.shape[1:] == left
    top, start = (8 - left[0]) // 2, (8 - left[1]) // 2
    assert torch.equal(got, whole[:, top : top + left[0], start : start + left[1]])


def test_maps_shrink_only_above_the_limit() -> None:
    item, given = image((20, 20), (2, 2)), features(5, 4)
    sizes = {}
    for most in (1, 2, 3, 4, None):
        tokens = identity(most_tiles=most).embed(given, [item])[0].tokens
        sizes[most] = len(tokens) - 16
    # Sides of 8 divided by sqrt(4 / most): 2, 1.41, 1.15, and 1, which is not above 1.1.
    assert sizes == {1: 4 * 5, 2: 5 * 6, 3: 6 * 7, 4: 8 * 9, None: 8 * 9}


@pytest.mark.parametrize(("pool", "side"), [("bilinear", 3), ("average", 2), ("max", 2)])
def test_views_are_pooled_before_they_are_merged(pool: str, side: int) -> None:
    item, given = image((20, 20), (2, 2)), features(5, 5)
    adapter = identity(pool=pool, merge="spatial")
    views = adapter(given)
    assert views.grid == (side, side)
    got = adapter.embed(given, [item])[0].tokens
    expected = oracle(views.tokens.detach(), side, item, "spatial")
    torch.testing.assert_close(got.detach(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_an_image_alone_equals_the_image_in_a_batch() -> None:
    encoder, adapter = AnyRes.tiny().eval(), LlavaGrid(32, 6, pool="bilinear")
    items = [encoder.prepare(AnyRes.example(seed)) for seed in range(2)]
    items.append(encoder.preprocess.several(AnyRes.example(2)))
    with torch.no_grad():
        batch = adapter.embed(encoder(items), items)
        for item, got in zip(items, batch, strict=True):
            alone = adapter.embed(encoder([item]), [item])[0]
            torch.testing.assert_close(got.tokens, alone.tokens, atol=1e-5, rtol=1e-5)


def test_every_weight_learns() -> None:
    adapter = LlavaGrid(2, 4, pool="max", most_tiles=2)
    adapter.embed(features(5, 6), [image((20, 30), (2, 2))])[0].tokens.square().sum().backward()
    for name, weight in adapter.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("merge", ["flat", "spatial"])
def test_only_unpad_has_a_newline(merge: str) -> None:
    assert {"newline"} == LlavaGrid(2, 4).state_dict().keys() - LlavaGrid(2, 4, merge).state_dict()


def test_bad_features_and_images_are_rejected() -> None:
    adapter, item = LlavaGrid(2, 4), image((20, 30), (2, 2))
    with pytest.raises(ValueError, match="4 rows of features for 5 views of 1 images"):
        adapter.embed(features(4, 3), [item])
    given = features(5, 3)
    with pytest.raises(ValueError, match="padded or have no grid"):
        adapter.embed(Features(given.tokens, given.mask), [item])
    given.mask[2, 0] = False
    with pytest.raises(ValueError, match="padded or have no grid"):
        adapter.embed(given, [item])
    with pytest.raises(ValueError, match=r"4 tiles besides the overview and tiles per axis \(3, 2"):
        adapter.embed(features(5, 3), [image((20, 30), (3, 2), views=5)])
    with pytest.raises(ValueError, match=r"original size \(\)"):
        adapter.embed(features(5, 3), [image((), (2, 2))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"merge": "unpad"},
            "merge is 'unpad', expected one of 'flat', 'spatial', 'spatial_unpad'",
        ),
        ({"pool": "mean"}, "pool is 'mean', expected one of 'bilinear'"),
        ({"factor": 0}, "factor is 0"),
        ({"most_tiles": 0}, "most_tiles is 0"),
        ({"merge": "flat", "most_tiles": 4}, "most_tiles=4 has no effect with merge='flat'"),
    ],
)
def test_bad_arguments_of_a_llava_grid(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlavaGrid(2, 4, **options)
