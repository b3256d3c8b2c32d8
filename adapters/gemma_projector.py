"""Gemma's projector of image tokens: a norm without a weight, then one layer."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from torch.nn import functional as F

from adapters.adapter import Adapter
from encoders.checks import Count
from encoders.features import Features


class GemmaProjector(Adapter):
    """RMSNorm without a weight, in float32, then a linear layer without a bias.

    Source: huggingface/transformers: models/diffusion_gemma (DiffusionGemmaMultimodalEmbedder).

    Args:
        in_dim: encoder width E.
        out_dim: backbone width D.
    """

    KEYS: ClassVar[dict[str, str]] = {"linear.weight": "embedding_projection.weight"}

    def __init__(self, in_dim: Count, out_dim: Count) -> None:
        super().__init__(in_dim, out_dim)
        self.linear = nn.Linear(in_dim, out_dim, bias=False)

    def forward(self, features: Features) -> Features:
        """Tokens of width D; mask and sizes are unchanged.

        Args:
            features: tokens [B N E].
        """
        tokens = F.rms_norm(features.tokens.float(), (self.in_dim,), eps=1e-6)
        tokens = tokens.to(self.linear.weight.dtype)
        return Features(self.linear(tokens), features.mask, features.sizes)
