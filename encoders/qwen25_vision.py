"""Qwen2.5-VL's vision tower without its merger: most blocks attend within windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.checks import Count
from encoders.encoder import Encoder
from encoders.features import Features, Prepared
from encoders.qwen_attention import angles_of, attend, merged, note_units
from encoders.qwen_vision import NORM_EPS, PatchInput, QwenVision, check_items


class Qwen25Vision(Encoder):
    """Encodes images of any size; a token is merge x merge neighbouring patches side by side.

    Blocks attend within windows of `window` pixels a side, but for those in `full`, which attend to
    the whole image. What makes one vector of the neighbours is `adapters.qwen_merger.QwenMerger`.

    Source: Qwen2.5-VL (arXiv 2502.13923); huggingface/transformers: models/qwen2_5_vl, the oracle
    of the tests; hustvl/DiffusionVL: train/llava/model/multimodal_encoder/qwen_vision_tower.py.

    Args:
        width: width of the blocks.
        depth: number of blocks.
        heads: attention heads; the width of each is a multiple of four.
        inner: width of each block's hidden layer.
        window: side of a window in pixels.
        full: numbers of the blocks that attend to the whole image, from 0.
        layer: which hidden layer is returned: -1 that of the last block, -2 that of the one before,
            and so on; 0 the patches before the first block.
        patch: patch side in pixels.
        merge: patches per side of a token.
        frames: frames per patch.
        min_pixels: see `PatchInput`.
        max_pixels: see `PatchInput`.
        mean: see `PatchInput`.
        std: see `PatchInput`.
        square: see `PatchInput`.
    """

    kind = "image"

    KEYS: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "patches.weight": "patch_embed.proj.weight",
        **{
            f"blocks.{{i}}.{each}.weight": f"blocks.{{i}}.{each}.weight"
            for each in ("norm1", "norm2")
        },
        **{
            f"blocks.{{i}}.{ours}.{of}": f"blocks.{{i}}.{published}.{of}"
            for ours, published in (
                ("qkv", "attn.qkv"),
                ("out", "attn.proj"),
                ("gate", "mlp.gate_proj"),
                ("up", "mlp.up_proj"),
                ("down", "mlp.down_proj"),
            )
            for of in ("weight", "bias")
        },
    }

    def __init__(
        self,
        width: Count = 1280,
        *,
        depth: Count = 32,
        heads: Count = 16,
        inner: Count = 3420,
        window: Count = 112,
        full: tuple[int, ...] = (7, 15, 23, 31),
        layer: int = -1,
        patch: int = 14,
        merge: int = 2,
        frames: int = 2,
        min_pixels: int = PatchInput.min_pixels,
        max_pixels: int = PatchInput.max_pixels,
        mean: tuple[float, float, float] = PatchInput.mean,
        std: tuple[float, float, float] = PatchInput.std,
        square: bool = False,
    ) -> None:
        super().__init__()
        self.preprocess = PatchInput(
            patch, merge, frames, min_pixels, max_pixels, mean, std, square
        )
        if width % heads or width // heads % 4:
            raise ValueError(
                f"Qwen25Vision: width={width} over heads={heads}; expected heads whose width is a "
                "multiple of 4, for rotary positions of rows and columns"
            )
        self.side = window // merge // patch
        if not self.side:
            raise ValueError(
                f"Qwen25Vision: window={window} pixels, expected at least one token of {merge} x "
                f"{merge} patches of {patch} pixels"
            )
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"Qwen25Vision: layer={layer}, expected {-depth - 1} to {depth} for {depth} blocks"
            )
        self.used = layer if layer >= 0 else depth + 1 + layer
        self.dim, self.heads, self.merge, self.full = (
            width * merge**2,
            heads,
            merge,
            frozenset(full),
        )
        cut = (frames, patch, patch)
        self.patches = nn.Conv3d(3, width, cut, cut, bias=False)
        self.blocks = nn.ModuleList(_Block(width, heads, inner) for _ in range(depth))

    def forward(self, items: Sequence[Prepared]) -> Features:
        """One token per merge x merge patches, row-major: tokens [B N E], padded at the end.

        Args:
            items: images as `preprocess` gives them, of any sizes.
        Raises:
            ValueError: no images, or one that another preprocessing made.
        """
        weight = self.patches.weight.flatten(1)  # [width C*T*P*P]
        check_items("Qwen25Vision", items, weight.shape[1], self.merge)
        unit, quarter = self.merge**2, len(weight) // self.heads // 4
        order, windows, images = self._windows(items)
        patches = torch.cat([item.tensor.to(weight.device, weight.dtype) for item in items])
        angles = torch.cat([angles_of(item.grid, self.merge, quarter) for item in items])
        x = rearrange(F.linear(patches, weight), "(n m) width -> n m width", m=unit)
        order = order.to(x.device)
        x = x[order].flatten(0, 1)  # [sum of N width], window by window
        angles = rearrange(angles.to(x.device), "(n m) a -> n m a", m=unit)[order].flatten(0, 1)
        turn = angles.cos(), angles.sin()
        for i, block in enumerate(self.blocks[: self.used]):
            if i == self.last_full:
                note_units(self, block, x, turn, images, items, order)
            x = block(x, turn, images if i in self.full else windows)
        tokens = rearrange(x, "(n m) width -> n (m width)", m=unit)[order.argsort()]
        return merged(tokens, items, self.merge)

    def _windows(self, items: Sequence[Prepared]) -> tuple[Tensor, list[int], list[int]]:
        """Order of the tokens window by window, and patches of each window and of each frame."""
        orders, windows, images, start = [], [], [], 0
        for t, rows, columns in (item.grid for item in items):
            y, x = rows // self.merge, columns // self.merge
            across = -(-x // self.side)
            place = torch.arange(y)[:, None] // self.side * across + torch.arange(x) // self.side
            order = place.flatten().argsort(stable=True)
            counts = (place.flatten().bincount() * self.merge**2).tolist()
            for _ in range(t):
                orders.append(order + start)
                windows += counts
                images.append(rows * columns)
                start += y * x
        return torch.cat(orders), windows, images

    @property
    def last_full(self) -> int | None:
        """Number of the last block in use that attends to the whole image; None without."""
        return max((i for i in self.full if i < self.used), default=None)

    @property
    def records_attention(self) -> bool:
        """See `Encoder.records_attention`: that of `last_full`."""
        return self.last_full is not None

    @classmethod
    def tiny(cls) -> Self:
        """Two blocks of width 16, the second with full attention; windows of 56 pixels."""
        return cls(16, depth=2, heads=2, inner=24, window=56, full=(1,))

    @staticmethod
    def example(seed: int = 0) -> np.ndarray:
        """A random uint8 image of 60 to 120 pixels a side."""
        return QwenVision.example(seed)


class _Block(nn.Module):
    """Attention within each stretch, then a gated hidden layer."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPS)
        self.gate = nn.Linear(width, inner)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        """Patches [n width] in stretches of `lengths`."""
        x = x + self.out(attend(self.qkv(self.norm1(x)), turn, lengths, self.heads))
        hidden = self.norm2(x)
        return x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))
