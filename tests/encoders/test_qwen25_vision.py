"""Qwen2.5-VL's tower and merger: equal to transformers, windows, hidden layers, bad input."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapters.qwen_merger import QwenMerger
from encoders.qwen25_vision import Qwen25Vision
from encoders.qwen_vision import PatchInput

SIZES = {"depth": 3, "num_heads": 2, "hidden_size": 16, "intermediate_size": 24}
SMALL = {"width": 16, "depth": 3, "heads": 2, "inner": 24, "min_pixels": 1, "max_pixels": 9000}


def fill(module: nn.Module, weights: dict[str, Tensor]) -> set[str]:
    """Loads published weights by `KEYS`; the names that were used."""
    state, used = {}, set()
    for name in module.state_dict():
        layer = re.search(r"blocks\.(\d+)\.", name)
        key = module.KEYS[re.sub(r"blocks\.\d+\.", "blocks.{i}.", name)]
        published = key.replace("{i}", layer[1]) if layer else key
        state[name] = weights[published]
        used.add(published)
    module.load_state_dict(state)
    return used


def oracle(**changes) -> nn.Module:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
    )

    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(**SIZES, out_hidden_size=20, **changes)
    made = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    for weight in made.parameters():  # biases and norms are constants otherwise
        nn.init.normal_(weight, std=0.2)
    return made


@torch.no_grad()
@pytest.mark.parametrize(
    ("window", "full", "merge", "layer"),
    [
        (112, (1,), 2, -1),
        (56, (0, 2), 2, -1),
        (56, (), 2, -2),
        (84, (1,), 2, 1),
        (42, (2,), 3, -1),
        (28, (0, 1, 2), 1, 0),
    ],
)
def test_equals_transformers_for_images_of_three_sizes(window, full, merge, layer):
    given = {"window_size": window, "fullatt_block_indexes": list(full)}
    theirs = oracle(**given, spatial_merge_size=merge)
    weights = theirs.state_dict()
    tower = Qwen25Vision(**SMALL, window=window, full=full, merge=merge, layer=layer)
    merger = QwenMerger(tower.dim, 20, merge)
    used = fill(tower, weights) | {
        f"merger.{name}"
        for name in fill(
            merger, {n.removeprefix("merger."): w for n, w in weights.items() if "merger." in n}
        )
    }
    assert used == set(weights)
    kept = layer if layer >= 0 else 3 + 1 + layer
    theirs.blocks = theirs.blocks[:kept]
    shapes = [(60, 100), (140, 90), (30, 30)]
    rng = np.random.default_rng(0)
    items = [tower.prepare(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in shapes]
    expected = theirs(
        torch.cat([item.tensor for item in items]),
        grid_thw=torch.tensor([item.grid for item in items]),
    ).pooler_output
    features = tower(items)
    got = merger(features)
    assert got.sizes == tuple((i.grid[1] // merge, i.grid[2] // merge) for i in items)
    torch.testing.assert_close(got.tokens[got.mask], expected, atol=1e-4, rtol=0)
    for i, item in enumerate(items):
        alone = tower([item]).tokens[0]
        torch.testing.assert_close(features.tokens[i][features.mask[i]], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_window_does_not_see_the_others():
    tower = Qwen25Vision(**SMALL | {"max_pixels": 20000}, window=56, full=())
    pixels = np.zeros((112, 112, 3), np.uint8)
    changed = pixels.copy()
    changed[60:, 60:] = 255  # within the last of four windows
    one, other = (tower([tower.prepare(each)]).tokens[0] for each in (pixels, changed))
    same = (one == other).all(-1).view(4, 4)
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[2:, 2:] = True
    assert torch.equal(same, ~inside)


def test_squares_are_padded_with_the_mean_colour():
    made = PatchInput(min_pixels=384 * 384, max_pixels=512 * 512, square=True)
    white = np.full((100, 300, 3), 255, np.uint8)
    got = made(white)
    assert got.size == (100, 300)
    assert got.grid == (1, 28, 28)
    first, middle = got.tensor[0], got.tensor[len(got.tensor) // 2]
    # 122, 116 and 104 of 255 are nearly the means, so almost zero after normalisation.
    assert first.abs().max() < 0.02
    assert middle.min() > 1.9


def test_every_parameter_gets_a_gradient():
    tower = Qwen25Vision.tiny()
    tower([tower.prepare(tower.example())]).tokens.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in tower.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 24, "heads": 4}, "width=24 over heads=4.*multiple of 4"),
        ({"window": 20}, "window=20 pixels, expected at least one token"),
        ({"layer": -5}, "layer=-5, expected -4 to 3"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(ValueError, match=message):
        Qwen25Vision(**{**SMALL, **given})


def test_items_of_another_preprocessing_are_refused():
    tower = Qwen25Vision.tiny()
    with pytest.raises(ValueError, match="Qwen25Vision: no images"):
        tower([])
    with pytest.raises(ValueError, match=r"Qwen25Vision: image 0 has patches"):
        tower([PatchInput(patch=2, min_pixels=16)(np.zeros((8, 12, 3), np.uint8))])


def test_the_merger_needs_whole_tokens():
    with pytest.raises(ValueError, match="in_dim=18, expected a multiple of the 4 patches"):
        QwenMerger(18, 8)
