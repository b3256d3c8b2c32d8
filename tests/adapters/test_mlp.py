"""MLP: parity with the LLaVA projector, layer counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters.mlp import MLP
from encoders.features import Features

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "siglip.safetensors"


def test_mlp_equals_the_published_projector():
    golden = load_file(GOLDEN)
    mlp = MLP(32, 48)
    mlp.load_state_dict({ours: golden[published] for ours, published in MLP.KEYS.items()})
    tokens = golden["tower"]
    out = mlp(Features(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)))
    torch.testing.assert_close(out.tokens, golden["projected"], atol=1e-5, rtol=1e-5)


def test_mlp_keeps_mask_and_grid():
    mask = torch.tensor([[True, False, True, True]])
    out = MLP(3, 5)(Features(torch.randn(1, 4, 3), mask, (2, 2)))
    assert out.tokens.shape == (1, 4, 5)
    assert out.mask is mask
    assert out.grid == (2, 2)


def test_mlp_takes_features_of_another_type():
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert MLP(3, 5).bfloat16()(Features(torch.randn(1, 4, 3), mask)).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_mlp_has_as_many_linear_layers_as_asked(layers):
    modules = list(MLP(3, 5, layers=layers).modules())
    assert sum(isinstance(module, torch.nn.Linear) for module in modules) == layers


def test_mlp_needs_a_layer():
    with pytest.raises(ValueError, match="layers is 0"):
        MLP(3, 5, layers=0)
