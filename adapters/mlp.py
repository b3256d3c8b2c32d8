"""LLaVA projector: linear layers with GELU activations."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from adapters.adapter import Adapter
from encoders.checks import Count
from encoders.features import Features


class MLP(Adapter):
    """Projects each token: Linear, then (exact GELU, Linear) for each further layer.

    Two layers are the `mlp2x_gelu` projector of LLaVA, LaViDa and LLaDA-V
    (jacklishufan/LaViDa: llava/model/multimodal_projector/builder.py).

    Args:
        in_dim: encoder width E.
        out_dim: backbone width D, also of the hidden layers.
        layers: number of linear layers.
    """

    needs_grid: ClassVar[bool] = False

    # Our names to published names, for two layers.
    KEYS: ClassVar[dict[str, str]] = {
        "layers.0.weight": "model.mm_projector.0.weight",
        "layers.0.bias": "model.mm_projector.0.bias",
        "layers.2.weight": "model.mm_projector.2.weight",
        "layers.2.bias": "model.mm_projector.2.bias",
    }

    def __init__(self, in_dim: Count, out_dim: Count, layers: Count = 2) -> None:
        super().__init__(in_dim, out_dim)
        modules: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
        for _ in range(layers - 1):
            modules += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        self.layers = nn.Sequential(*modules)

    def forward(self, features: Features) -> Features:
        """Tokens of width D in the dtype of the weights; mask and sizes are unchanged.

        Args:
            features: tokens [B N E].
        """
        tokens = features.tokens.to(self.layers[0].weight.dtype)
        return Features(self.layers(tokens), features.mask, features.sizes)
