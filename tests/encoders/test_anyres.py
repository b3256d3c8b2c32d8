"""AnyRes: canvases and pixels equal LaViDa's and LLaDA-V's, and errors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from encoders.anyres import AnyRes, AnyResInput, best_canvas, fit, parse_pinpoints
from encoders.state import StateEncoder
from encoders.vit import ImageInput, ViT

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
SELECTION = json.loads((GOLDEN / "lavida_schedules" / "anyres.json").read_text())
LAVIDA = "[(384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152)]"
LLADA_V = "(1x1),(2x2),(3x3),(4x4),(5x5),(6x6)"


@pytest.mark.parametrize("case", SELECTION, ids=lambda case: "x".join(map(str, case["size_wh"])))
@pytest.mark.parametrize(("system", "pinpoints"), [("lavida", LAVIDA), ("llada_v", LLADA_V)])
def test_canvas_and_tiles_equal_reference(system: str, pinpoints: str, case: dict) -> None:
    expected, (width, height) = case[system], case["size_wh"]
    canvases = parse_pinpoints(pinpoints, 384)
    assert list(best_canvas((width, height), canvases)) == expected["best_wh"]
    prepare = AnyResInput(ImageInput(384), canvases)
    if width * height > 1e6:  # keeps the test fast; the choice above covers them
        return
    views = prepare(np.zeros((height, width, 3), np.uint8))
    assert views.tensor.shape == (expected["tiles"], 3, 384, 384)
    assert views.size == (height, width)
    assert [384 * side for side in views.grid[::-1]] == expected["best_wh"]


@pytest.mark.parametrize("mode", ["anyres", "pad", "square"])
@pytest.mark.parametrize("number", range(3))
def test_pixels_of_384_pixel_views_equal_reference(number: int, mode: str) -> None:
    golden = load_file(GOLDEN / "lavida_schedules" / "tensors.safetensors")
    prepare = AnyResInput(ImageInput(384), parse_pinpoints(LAVIDA, 384), mode)
    got = prepare(Image.open(GOLDEN / "lavida_schedules" / f"img{number}.png")).tensor
    name = f"img{number}" if mode == "anyres" else f"img{number}.{mode}"
    strided = golden[f"{name}.pixels_strided"]
    views = got if mode == "anyres" else got[0]
    torch.testing.assert_close(views[..., 3::24, 5::24], strided, atol=1e-6, rtol=0)
    if mode == "anyres":
        assert list(got.shape) == golden[f"{name}.shape"].tolist()
        mean_std = torch.stack([got.mean((2, 3)), got.std((2, 3), correction=0)])
        torch.testing.assert_close(mean_std, golden[f"{name}.mean_std"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", range(3))
def test_pixels_of_small_views_equal_reference(number: int) -> None:
    folder = GOLDEN / "lavida_llada"
    pinpoints = json.loads((folder / "config.json").read_text())["mm"]["image_grid_pinpoints"]
    vit = ViT(size=54, patch=2, dim=8, depth=1, heads=1, stem="patch")
    got = AnyRes(vit, pinpoints).prepare(Image.open(folder / f"img{number}.png"))
    expected = load_file(folder / "tensors.safetensors")[f"img{number}.pixel_values"]
    torch.testing.assert_close(got.tensor, expected, atol=1e-6, rtol=0)


def test_pinpoints_are_pairs_text_or_a_range_of_tiles() -> None:
    pairs = ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152))
    assert parse_pinpoints(LAVIDA, 384) == pairs
    assert parse_pinpoints([list(pair) for pair in pairs], 384) == pairs
    every = parse_pinpoints(LLADA_V, 384)
    assert len(every) == 36
    assert every[:2] == ((384, 384), (384, 768))
    assert every[6] == (768, 384)


def test_the_smaller_canvas_wins_among_those_that_show_every_pixel() -> None:
    assert best_canvas((10, 10), ((64, 64), (32, 32), (32, 64))) == (32, 32)
    assert best_canvas((10, 10), ((64, 32), (32, 64))) == (64, 32)


def test_an_image_fills_one_axis_of_its_canvas_on_black() -> None:
    image = Image.new("RGB", (10, 5), (255, 255, 255))
    wide, tall = (np.asarray(fit(image, canvas)) for canvas in ((40, 33), (50, 20)))
    assert wide[6:26].min() == 255
    assert wide[:6].max() == wide[26:].max() == 0
    assert tall[:, 5:45].min() == 255
    assert tall[:, :5].max() == tall[:, 45:].max() == 0


def test_overview_comes_first_and_tiles_go_row_by_row() -> None:
    quarters = np.array([[0, 50], [100, 150]], np.uint8).repeat(16, 0).repeat(16, 1)
    prepare = AnyResInput(ImageInput(16, (0, 0, 0), (1, 1, 1)), ((32, 32),))
    views = (prepare(quarters).tensor * 255).round()
    assert [int(view.median()) for view in views[1:]] == [0, 50, 100, 150]
    assert int(views[0, 0, 0, 0]) == 0
    assert int(views[0, 0, -1, -1]) == 150


def test_pad_centres_the_image_on_the_mean_colour() -> None:
    prepare = AnyResInput(ImageInput(8), mode="pad")
    got = prepare(np.full((4, 8, 3), 255, np.uint8))
    assert got.tensor.shape == (1, 3, 8, 8)
    assert got.grid == ()
    grey = (127 - 127.5) / 127.5
    assert got.tensor[0, 0, :, 0].tolist() == pytest.approx([grey] * 2 + [1] * 4 + [grey] * 2)


def test_several_images_are_padded_one_view_each() -> None:
    prepare = AnyRes.tiny().preprocess
    assert len(prepare(AnyRes.example()).tensor) > 1
    assert prepare.several(AnyRes.example()).tensor.shape == (1, 3, 16, 16)
    square = AnyResInput(ImageInput(16), mode="square")
    assert square.several is square


def test_the_views_of_several_images_are_encoded_in_order() -> None:
    encoder = AnyRes.tiny().eval()
    items = [encoder.prepare(AnyRes.example(seed)) for seed in range(2)]
    items.append(encoder.prepare(np.zeros((9, 60, 3), np.uint8)))
    counts = [len(item.tensor) for item in items]
    assert counts[0] != counts[2]
    with torch.no_grad():
        features = encoder(items)
        alone = torch.cat([encoder([item]).tokens for item in items])
    assert features.tokens.shape == (sum(counts), 4, 32)
    assert features.grid == (2, 2)
    torch.testing.assert_close(features.tokens, alone, atol=1e-5, rtol=1e-5)


def test_preprocessing_pickles_without_weights() -> None:
    prepare = AnyRes.tiny().preprocess
    data = pickle.dumps(prepare)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again == prepare
    assert torch.equal(again(AnyRes.example()).tensor, prepare(AnyRes.example()).tensor)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_tiny_and_thin_images_give_whole_views(size: tuple[int, int]) -> None:
    got = AnyRes.tiny().prepare(np.zeros((*size, 3), np.uint8))
    assert got.tensor.shape[1:] == (3, 16, 16)
    assert len(got.tensor) == 1 + got.grid[0] * got.grid[1]
    assert got.tensor.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pinpoints": ((24, 32),)}, r"canvas \(24, 32\); expected .* multiples of .* 16 pixels"),
        ({"pinpoints": ((0, 16),)}, r"canvases is \(\(0, 16\),\), expected .* at least 1"),
        ({"pinpoints": "four by four"}, "pinpoints 'four by four'; expected"),
        ({"pinpoints": [1, 2]}, "pinpoints .*; expected"),
        ({"pinpoints": ()}, "mode='anyres' without canvases"),
        ({"pinpoints": ((16, 16),), "mode": "crop"}, "mode is 'crop', expected one of"),
    ],
)
def test_bad_arguments_of_anyres(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnyRes(ViT.tiny(), **arguments)


def test_an_encoder_of_another_medium_is_rejected() -> None:
    with pytest.raises(ValueError, match="encoder is a StateEncoder; expected one of square image"):
        AnyRes(StateEncoder(3, 8), ((16, 16),))
