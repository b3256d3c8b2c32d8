"""Small pre-norm vision transformer for training from scratch, without timm's import time.

Architecture, parameter names and initialisation are those of timm's `VisionTransformer` without
class token, pooling and head (ViT, arXiv 2010.11929; LayerNorm eps 1e-6).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6
# Up to this many tokens attention is computed unfused: the fused kernel saves memory that so few
# tokens do not need, and on a CPU its bfloat16 backward takes four times as long as in float32. A
# training step with 64 tokens takes 27 % less time.
UNFUSED = 256


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [B C Y X]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B C Y X], each position normalised by itself."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchStem(nn.Module):
    """One token per patch by one convolution whose stride is the patch side.

    Args:
        size: image side in pixels; a remainder at the right and bottom edge is not read.
        patch: patch side in pixels.
        dim: token width E.
    """

    def __init__(self, size: int, patch: int, dim: int) -> None:
        super().__init__()
        self.img_size, self.grid_size = (size, size), (size // patch,) * 2
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens [B N E], row-major, of images [B 3 Y X]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """One token per patch by stacked convolutions (arXiv 2106.14881), the later ones residual.

    Each norm runs over the channels of one position. Statistics over the image (group norm) would
    mix the background into the objects, statistics over the batch would mix the images.

    Args:
        size: image side in pixels, a multiple of `patch`.
        patch: total stride, a power of two.
        dim: token width E.
    """

    def __init__(self, size: int, patch: int, dim: int) -> None:
        super().__init__()
        self.img_size, self.grid_size = (size, size), (size // patch,) * 2
        count = int(math.log2(patch))
        # Widths double with each halving of the side: 32, 64, 128, then 192 for patches of 8.
        widths = [max(8, dim * 2 ** (step + 2) // (3 * 2**count)) for step in range(count)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 5, 2, 2)]
        for index, (narrow, wide) in enumerate(zip(widths, [*widths[1:], dim], strict=True)):
            stride = 1 if index == count - 1 else 2
            layers += [nn.GELU(), ResidualConv(narrow, wide, stride)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens [B N E], row-major, of images [B 3 Y X]."""
        return self.layers(images).flatten(2).transpose(1, 2)


class ResidualConv(nn.Module):
    """Two 3x3 convolutions with a 1x1 shortcut; the first may have a stride."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(narrow, wide, 3, stride, 1)
        self.norm = LayerNorm2d(wide)
        self.second = nn.Conv2d(wide, wide, 3, 1, 1)
        self.shortcut = nn.Conv2d(narrow, wide, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B wide Y' X'] of [B narrow Y X]."""
        return self.shortcut(x) + self.second(F.gelu(self.norm(self.first(x))))


class Attention(nn.Module):
    """Bidirectional multi-head self-attention with one projection for q, k and v."""

    def __init__(self, dim: int, heads: int, is_fused: bool) -> None:
        super().__init__()
        self.heads, self.is_fused = heads, is_fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B N E] of [B N E]."""
        batch, count, dim = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B H N E/H]
        if self.is_fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B H N N]
            out = scores.softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, count, dim))


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, inner: int, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B N E] of [B N E]."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to its input."""

    def __init__(self, dim: int, heads: int, inner: int, approximate: str, is_fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, is_fused)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, inner, approximate)

    def forward(self, x: Tensor) -> Tensor:
        """[B N E] of [B N E]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """Vision transformer with one token per patch; attributes as in timm's `VisionTransformer`.

    Args:
        size: image side in pixels.
        patch: patch side in pixels.
        dim: token width E, a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of each block's hidden layer over E.
        act: gelu (exact) or gelu_tanh.
        stem: conv (stride-2 convolutions, trains faster from scratch) or patch.
    Raises:
        ValueError: sizes that do not go together, or an unknown `act` or `stem`.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        size: int = 64,
        patch: int = 8,
        dim: int = 192,
        depth: int = 2,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        act: Literal["gelu", "gelu_tanh"] = "gelu",
        stem: Literal["conv", "patch"] = "conv",
    ) -> None:
        super().__init__()
        check_sizes(size, patch, dim, heads, stem)
        if act not in ("gelu", "gelu_tanh"):
            raise ValueError(f"ViT: act={act!r}; expected 'gelu' or 'gelu_tanh'")
        self.embed_dim = dim
        self.patch_embed = (ConvStem if stem == "conv" else PatchStem)(size, patch, dim)
        count = math.prod(self.patch_embed.grid_size)
        self.pos_embed = nn.Parameter(torch.empty(1, count, dim))
        approximate = "none" if act == "gelu" else "tanh"
        self.blocks = nn.Sequential(
            *(
                Block(dim, heads, int(dim * mlp_ratio), approximate, count > UNFUSED)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.reset()

    def reset(self) -> None:
        """Positions and linear weights from a normal of 0.02, biases zero; norms and stem stay.

        Nothing on the meta device, where this would import torch._dynamo.
        """
        if self.pos_embed.is_meta:
            return
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens [B N E], row-major, of images [B 3 Y X]."""
        return self.norm(self.blocks(self.patch_embed(images) + self.pos_embed))


def check_sizes(size: int, patch: int, dim: int, heads: int, stem: str) -> None:
    """Raises ValueError for sizes that do not go together."""
    if dim % heads:
        raise ValueError(f"ViT: dim={dim} is not a multiple of heads={heads}")
    if size < patch:
        raise ValueError(f"ViT: size={size} is smaller than patch={patch}")
    if stem not in ("conv", "patch"):
        raise ValueError(f"ViT: stem={stem!r}; expected 'conv' or 'patch'")
    if stem == "conv" and (patch < 2 or patch & (patch - 1) or size % patch):
        raise ValueError(
            f"ViT: stem='conv' with size={size} and patch={patch}; expected patch a power of two "
            "and size a multiple of it, or stem='patch'"
        )
