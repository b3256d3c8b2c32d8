"""Qwen2.5-VL's patch merger: a norm of each patch, then two layers over neighbouring ones."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from torch.nn import functional as F

from adapters.adapter import Adapter
from encoders.checks import Count
from encoders.features import Features


class QwenMerger(Adapter):
    """Projects tokens of merge x merge patches side by side: RMSNorm, Linear, exact GELU, Linear.

    Source: huggingface/transformers: models/qwen2_5_vl (Qwen2_5_VLPatchMerger);
    hustvl/DiffusionVL: train/llava/model/multimodal_projector/qwen_projector.py.

    Args:
        in_dim: encoder width E, merge x merge times the width of a patch.
        out_dim: backbone width D.
        merge: patches per side of a token.

    Raises:
        ValueError: `in_dim` is not a multiple of merge x merge.
    """

    needs_grid: ClassVar[bool] = False

    KEYS: ClassVar[dict[str, str]] = {
        "norm.weight": "ln_q.weight",
        **{
            f"{ours}.{of}": f"mlp.{published}.{of}"
            for ours, published in (("up", 0), ("down", 2))
            for of in ("weight", "bias")
        },
    }

    def __init__(self, in_dim: Count, out_dim: Count, merge: Count = 2) -> None:
        super().__init__(in_dim, out_dim)
        if in_dim % merge**2:
            raise ValueError(
                f"QwenMerger: in_dim={in_dim}, expected a multiple of the {merge**2} patches of a "
                "token"
            )
        self.merge = merge
        self.norm = nn.RMSNorm(in_dim // merge**2, eps=1e-6)
        self.up = nn.Linear(in_dim, in_dim)
        self.down = nn.Linear(in_dim, out_dim)

    def forward(self, features: Features) -> Features:
        """Tokens of width D; mask and sizes are unchanged.

        Args:
            features: tokens [B N E].
        """
        tokens = features.tokens.to(self.up.weight.dtype)
        x = self.norm(tokens.unflatten(-1, (self.merge**2, -1))).flatten(-2)
        return Features(self.down(F.gelu(self.up(x))), features.mask, features.sizes)
