"""Toy model and prompts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.model import MultimodalDLM


@pytest.fixture(scope="session")
def toy() -> MultimodalDLM:
    """A small random model; ids: 0 padding, 1 end, 2 mask."""
    sizes = TransformerConfig(vocab=40, width=32, layers=2, heads=4, inner=64)
    spec = Spec("toy", sizes, mask_id=2, eos_id=1, pad_id=0, stop_ids=(3,))
    model = MultimodalDLM(spec).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.normal_(std=0.3, generator=generator)
    return model


@pytest.fixture(scope="session")
def batch() -> Callable[..., tuple[Tensor, Tensor]]:
    """batch(*sizes): left-padded batch of random prompts, with its mask."""

    def make(*sizes: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        tokens = torch.zeros(len(sizes), max(sizes), dtype=torch.long)
        for row, size in zip(tokens, sizes, strict=True):
            row[-size:] = torch.randint(4, 40, (size,), generator=generator)
        return tokens, tokens != 0

    return make
