"""Qwen2-VL's tower: parity with Dream-VL, Dream-VLA and transformers, sizes, and bad input."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from adapters.mlp import MLP
from encoders.features import Prepared
from encoders.qwen_vision import PatchInput, QwenVision

GOLDEN = Path(__file__).parents[1] / "golden"
DREAM_VL = GOLDEN / "vision" / "dream_vl"
PROJECTOR = {"layers.0": "projector.linear_1", "layers.2": "projector.linear_2"}
SMALL = PatchInput(patch=2, merge=2, min_pixels=16, max_pixels=1600)


def fill(tower: QwenVision, weights: dict[str, torch.Tensor], prefix: str = "visual.") -> set[str]:
    """Loads published weights by `QwenVision.KEYS`; the names that were used."""
    state = {}
    used = set()
    for name in tower.state_dict():
        layer = re.search(r"blocks\.(\d+)\.", name)
        key = QwenVision.KEYS[re.sub(r"blocks\.\d+\.", "blocks.{i}.", name)]
        published = prefix + (key.replace("{i}", layer[1]) if layer else key)
        state[name] = weights[published]
        used.add(published)
    tower.load_state_dict(state)
    return used


def projector(weights: dict[str, torch.Tensor], in_dim: int, out_dim: int) -> MLP:
    """The published projector."""
    mlp = MLP(in_dim, out_dim)
    mlp.load_state_dict(
        {f"{o}.{part}": weights[f"{p}.{part}"] for o, p in PROJECTOR.items() for part in PARTS}
    )
    return mlp


PARTS = ("weight", "bias")


@torch.no_grad()
def test_dream_vla_equals_the_reference():
    weights = load_file(GOLDEN / "action" / "dreamvla_model.safetensors")
    golden = load_file(GOLDEN / "action" / "dreamvla_io.safetensors")
    tower = QwenVision(24, width=16, depth=1, heads=2, mlp_ratio=2)
    used = fill(tower, weights)
    assert used == {name for name in weights if name.startswith("visual.")}
    items = [tower.prepare(golden[f"image.{i}"].numpy()) for i in range(2)]
    assert torch.equal(torch.cat([item.tensor for item in items]), golden["pixel_values"])
    assert [list(item.grid) for item in items] == golden["image_grid_thw"].tolist()
    features = tower(items)
    torch.testing.assert_close(
        features.tokens.flatten(0, 1), golden["vision"], atol=1e-5, rtol=1e-5
    )
    projected = projector(weights, 24, 32)(features)
    torch.testing.assert_close(
        projected.tokens.flatten(0, 1), golden["projected"], atol=1e-5, rtol=1e-5
    )
    assert projected.sizes == ((2, 2), (2, 2))


@torch.no_grad()
def test_dream_vl_images_of_three_sizes_in_one_batch_equal_the_reference():
    weights, golden = (load_file(DREAM_VL / f"{n}.safetensors") for n in ("weights", "tensors"))
    config = json.loads((DREAM_VL / "config.json").read_text())
    limits = {k: config["processor"][k] for k in ("min_pixels", "max_pixels")}
    tower = QwenVision(48, width=32, depth=2, heads=2, **limits)
    fill(tower, weights)
    items = [tower.prepare(Image.open(DREAM_VL / f"img{i}.png")) for i in range(3)]
    features = tower(items)
    embedded = projector(weights, 48, 48).embed(features, items)
    for i, item in enumerate(items):
        assert [list(item.grid)] == golden[f"img{i}.grid_thw"].tolist()
        columns, rows = config["image_sizes_wh"][i]
        assert item.size == (rows, columns)
        torch.testing.assert_close(
            item.tensor[::2], golden[f"img{i}.pixel_values"], atol=1e-6, rtol=0
        )
        tokens = features.tokens[i][features.mask[i]]
        torch.testing.assert_close(tokens, golden[f"img{i}.visual"], atol=1e-5, rtol=1e-5)
        got = embedded[i]
        torch.testing.assert_close(got.tokens, golden[f"img{i}.projected"], atol=1e-5, rtol=1e-5)
        assert got.grid == (item.grid[1] // 2, item.grid[2] // 2)
        alone = tower([item])
        torch.testing.assert_close(alone.tokens[0], tokens, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("merge", "frames", "heads"), [(2, 2, 3), (3, 1, 4), (1, 2, 1)])
def test_equals_transformers(merge, frames, heads):
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    sizes = {"depth": 3, "mlp_ratio": 3, "patch_size": 4, "num_heads": heads, "embed_dim": 48}
    config = Qwen2VLVisionConfig(
        **sizes, hidden_size=20, spatial_merge_size=merge, temporal_patch_size=frames
    )
    oracle = Qwen2VisionTransformerPretrainedModel(config).eval()
    shape = {"patch": 4, "merge": merge, "frames": frames, "min_pixels": 1, "max_pixels": 2000}
    tower = QwenVision(20, width=48, depth=3, heads=heads, mlp_ratio=3, **shape)
    assert fill(tower, oracle.state_dict(), "") == set(oracle.state_dict())
    items = [tower.prepare(QwenVision.example(seed)) for seed in range(3)]
    expected = oracle(
        torch.cat([item.tensor for item in items]),
        grid_thw=torch.tensor([item.grid for item in items]),
    ).pooler_output
    features = tower(items)
    torch.testing.assert_close(features.tokens[features.mask], expected, atol=1e-5, rtol=1e-5)


def published_size(height, width, factor, low, high):
    """The resizing rule as the published code states it: sides are enlarged first, then rounded."""
    if min(height, width) < factor:
        if height < width:
            height, width = factor, round(width / height * factor)
        else:
            height, width = round(height / width * factor), factor
    out = [round(height / factor) * factor, round(width / factor) * factor]
    if out[0] * out[1] > high:
        beta = (height * width / high) ** 0.5
        out = [int(height / beta / factor) * factor, int(width / beta / factor) * factor]
    elif out[0] * out[1] < low:
        beta = (low / (height * width)) ** 0.5
        out = [int(-(-height * beta // factor)) * factor, int(-(-width * beta // factor)) * factor]
    return tuple(out)


@pytest.mark.parametrize(("low", "high"), [(3136, 14112), (3136, 3211264), (50176, 60000)])
def test_sizes_follow_the_published_rule(low, high):
    made = PatchInput(min_pixels=low, max_pixels=high)
    for rows, columns in np.random.default_rng(0).integers(20, 400, (200, 2)).tolist():
        expected = published_size(rows, columns, 28, low, high)
        assert made.resized(rows, columns) == expected


def test_patches_hold_the_pixels_in_the_published_order():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    prepared = SMALL(pixels)
    assert prepared.kind == "image"
    assert prepared.grid == (1, 4, 6)
    expected = (pixels / 255 - SMALL.mean) / SMALL.std
    number = 0
    for y in range(0, 8, 4):  # tokens row by row
        for x in range(0, 12, 4):
            for a, b in ((0, 0), (0, 2), (2, 0), (2, 2)):  # their patches
                patch = expected[y + a : y + a + 2, x + b : x + b + 2].transpose(2, 0, 1)
                two_frames = np.stack([patch, patch], 1).flatten()
                np.testing.assert_allclose(prepared.tensor[number], two_frames, atol=1e-6)
                number += 1
    assert number == len(prepared.tensor)


def test_preprocessing_travels_to_other_processes():
    item = QwenVision.example()
    again = pickle.loads(pickle.dumps(QwenVision.tiny().preprocess))
    assert torch.equal(again(item).tensor, QwenVision.tiny().prepare(item).tensor)


def test_images_and_arrays_agree():
    tower = QwenVision.tiny()
    image = Image.open(DREAM_VL / "img0.png")
    array = np.array(image.convert("RGB"))
    expected = tower.prepare(image).tensor
    for item in (array, torch.from_numpy(array).movedim(-1, 0)):
        assert torch.equal(tower.prepare(item).tensor, expected)


def test_an_image_does_not_see_the_others_of_its_batch():
    tower = QwenVision.tiny().eval()
    first, second, third = (tower.prepare(tower.example(seed)) for seed in range(3))
    with torch.no_grad():
        one, other = tower([first, second]), tower([first, third])
    count = int(one.mask[0].sum())
    torch.testing.assert_close(one.tokens[0, :count], other.tokens[0, :count], atol=1e-6, rtol=0)


def test_every_parameter_gets_a_gradient():
    tower = QwenVision.tiny()
    tower([tower.prepare(tower.example())]).tokens.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in tower.parameters())


@pytest.mark.parametrize("shape", [(10, 2500), (2500, 10)])
def test_thin_images_are_enlarged_before_they_are_cut(shape):
    made = PatchInput()
    rows, columns = made.resized(*shape)
    assert min(rows, columns) == 28
    assert max(rows, columns) == 7000


def test_images_too_flat_are_refused():
    with pytest.raises(ValueError, match="30 x 9000 pixels; expected sides of a ratio of at most"):
        PatchInput().resized(30, 9000)
    with pytest.raises(ValueError, match="1 x 3000 pixels, too flat for max_pixels=14112"):
        PatchInput(max_pixels=14112).resized(1, 3000)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"merge": 0}, "merge is 0.*at least 1"),
        ({"max_pixels": 500}, "max_pixels=500.*one token"),
        ({"min_pixels": 9000, "max_pixels": 8000}, "min_pixels <= max_pixels"),
        ({"std": (1, 0, 1)}, "std is .*each at least"),
    ],
)
def test_bad_settings_of_the_preprocessing(given, message):
    with pytest.raises(ValueError, match=message):
        PatchInput(**given)


def test_heads_must_fit_two_axes():
    with pytest.raises(ValueError, match="width=24 over heads=4.*multiple of 4"):
        QwenVision(8, width=24, heads=4, depth=1)


def test_items_of_another_preprocessing_are_refused():
    tower = QwenVision.tiny()
    good = tower.prepare(tower.example())
    with pytest.raises(ValueError, match="no images"):
        tower([])
    with pytest.raises(ValueError, match=r"image 1 has patches \[24, 24\]"):
        tower([good, SMALL(np.zeros((8, 12, 3), np.uint8))])
    with pytest.raises(ValueError, match=r"image 0 .* on the grid \[\]"):
        tower([Prepared("image", good.tensor)])
    with pytest.raises(ValueError, match=r"on the grid \[1, 1, 1\]"):
        tower([Prepared("image", good.tensor[:1], (), (1, 1, 1))])
