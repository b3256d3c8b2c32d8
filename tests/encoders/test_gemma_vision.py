"""Gemma 4's tower and projector: sizes, batches and bad input.

Equality with transformers is in tests/systems/test_diffusion_gemma.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapters.gemma_projector import GemmaProjector
from encoders.gemma_vision import GemmaInput, GemmaVision


def test_images_stay_within_the_budget_and_keep_their_ratio():
    made = GemmaInput(patch=4, pool=2, tokens=12)
    for seed in range(20):
        rows, columns = np.random.default_rng(seed).integers(8, 300, 2).tolist()
        height, width = made.resized(rows, columns)
        assert height % 8 == width % 8 == 0 < height * width <= 12 * 64
    assert made.resized(10, 1000) == (8, 96)
    assert made.resized(1000, 10) == (96, 8)


@torch.no_grad()
def test_an_image_does_not_see_the_others_of_its_batch():
    tower = GemmaVision.tiny().eval()
    items = [tower.prepare(tower.example(seed)) for seed in range(3)]
    together = tower(items)
    for i, item in enumerate(items):
        alone = tower([item])
        rows, columns = alone.sizes[0]
        assert together.sizes[i] == (rows, columns)
        assert int(together.mask[i].sum()) == rows * columns <= 12
        torch.testing.assert_close(
            together.tokens[i][together.mask[i]], alone.tokens[0], atol=1e-5, rtol=0
        )
    projected = GemmaProjector(tower.dim, 24)(together)
    assert projected.tokens.shape == (*together.tokens.shape[:2], 24)
    assert projected.sizes == together.sizes


def test_items_of_another_preprocessing_are_refused():
    tower = GemmaVision.tiny()
    with pytest.raises(ValueError, match="GemmaVision: no images"):
        tower([])
    other = GemmaInput(patch=8, pool=2, tokens=12)(np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(ValueError, match=r"image 0 has patches.*expected \[N 48\]"):
        tower([other])
