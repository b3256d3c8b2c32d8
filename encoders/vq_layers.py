"""Convolutions of image tokenizers: pixels to latents and back, shared by all VQ models.

The architecture is that of VQGAN (arXiv 2012.09841), which MAGVIT-v2 and the VQModel of diffusers
have in common: residual blocks with group norm per level, halving or doubling in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after group norm and SiLU, with a 1x1 shortcut if widths differ.

    Args:
        narrow: input channels.
        wide: output channels.
        groups: groups of the norms.
    """

    def __init__(self, narrow: int, wide: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, narrow, EPS)
        self.conv1 = nn.Conv2d(narrow, wide, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, wide, EPS)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1)
        self.shortcut = nn.Identity() if narrow == wide else nn.Conv2d(narrow, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B wide Y X] of [B narrow Y X]."""
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(inner)))


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map.

    Args:
        width: channels.
        groups: groups of the norm.
        convolution: store the projections as 1x1 convolutions instead of linear layers, as the
            published file does; the function is the same.
    """

    def __init__(self, width: int, groups: int, convolution: bool) -> None:
        super().__init__()
        self.norm, self.convolution = nn.GroupNorm(groups, width, EPS), convolution
        for name in ("q", "k", "v", "proj"):
            layer = nn.Conv2d(width, width, 1) if convolution else nn.Linear(width, width)
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """[B C Y X] of [B C Y X]."""
        normed = self.norm(x)
        q, k, v = (self._project(layer, normed) for layer in (self.q, self.k, self.v))
        q, k, v = (each.flatten(2).transpose(1, 2)[:, None] for each in (q, k, v))  # [B 1 N C]
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]  # [B N C]
        return x + self._project(self.proj, mixed.transpose(1, 2).reshape(x.shape))

    def _project(self, layer: nn.Module, x: Tensor) -> Tensor:
        """[B C Y X] of [B C Y X], by a 1x1 convolution or a linear layer."""
        return layer(x) if self.convolution else layer(x.movedim(1, -1)).movedim(-1, 1)


class Middle(nn.Module):
    """Residual block, attention (optional), residual block at the lowest resolution.

    Args:
        width: channels.
        groups: groups of the norms.
        attention: None without attention, else how its projections are stored.
    """

    def __init__(self, width: int, groups: int, attention: str | None) -> None:
        super().__init__()
        self.first = ResidualBlock(width, width, groups)
        self.attention = (
            SpatialAttention(width, groups, attention == "convolution") if attention else None
        )
        self.second = ResidualBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B C Y X] of [B C Y X]."""
        x = self.first(x)
        return self.second(x if self.attention is None else self.attention(x))


class Level(nn.Module):
    """The residual blocks of one resolution, and the convolution that leads to the next one.

    Args:
        narrow: input channels.
        wide: output channels.
        blocks: number of residual blocks.
        groups: groups of the norms.
        scaled: whether another resolution follows.
        stride: 2 halves the resolution, 1 is for doubling.
    """

    def __init__(
        self, narrow: int, wide: int, blocks: int, groups: int, scaled: bool, stride: int
    ) -> None:
        super().__init__()
        widths = [narrow] + [wide] * (blocks - 1)
        self.blocks = nn.ModuleList(ResidualBlock(width, wide, groups) for width in widths)
        padding = 0 if stride == 2 else 1
        self.scale = nn.Conv2d(wide, wide, 3, stride, padding) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        """The next level's input of [B narrow Y X]."""
        for block in self.blocks:
            x = block(x)
        if self.scale is None:
            return x
        if self.scale.stride == (2, 2):
            return self.scale(F.pad(x, (0, 1, 0, 1)))
        return self.scale(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PixelEncoder(nn.Module):
    """Latents of pixels, each spatial side divided by 2 ** (levels - 1).

    Args:
        widths: channels of each level, from the highest resolution on.
        blocks: residual blocks of each level.
        latent: channels of the latents.
        groups: groups of the norms.
        attention: see `Middle`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        latent: int,
        groups: int,
        attention: str | None,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        before, last = [widths[0], *widths], len(widths) - 1
        self.levels = nn.ModuleList(
            Level(before[i], width, blocks[i], groups, i < last, 2)
            for i, width in enumerate(widths)
        )
        self.middle = Middle(widths[-1], groups, attention)
        self.norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], latent, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B latent Y/s X/s] of [B 3 Y X]."""
        x = self.conv_in(pixels)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class PixelDecoder(nn.Module):
    """Pixels of latents, the mirror image of `PixelEncoder`.

    Args:
        widths: channels of each level, from the highest resolution on.
        blocks: residual blocks of each level, in the same order.
        latent: channels of the latents.
        groups: groups of the norms.
        attention: see `Middle`.
        reverse: the levels are stored from the highest resolution on, although the lowest runs
            first.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        latent: int,
        groups: int,
        attention: str | None,
        reverse: bool,
    ) -> None:
        super().__init__()
        self.reverse = reverse
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.middle = Middle(widths[-1], groups, attention)
        after = [*widths, widths[-1]]
        levels = [
            Level(after[i + 1], width, blocks[i], groups, i > 0, 1)
            for i, width in enumerate(widths)
        ]
        self.levels = nn.ModuleList(levels if reverse else reversed(levels))
        self.norm_out = nn.GroupNorm(groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """[B 3 Y X] of [B latent Y/s X/s]."""
        x = self.middle(self.conv_in(latents))
        for level in reversed(self.levels) if self.reverse else self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def level_keys(ours: str, published: str, block: str, scale: str, shortcut: str) -> dict[str, str]:
    """Published names of the levels of a `PixelEncoder` or `PixelDecoder`.

    Args:
        ours: our prefix, such as "encoder.".
        published: published prefix of a level, with `{i}`.
        block: name of the list of residual blocks.
        scale: name of the convolution after them.
        shortcut: name of the 1x1 convolution of a residual block.
    """
    keys = {}
    for part in ("weight", "bias"):
        keys[f"{ours}levels.{{i}}.scale.{part}"] = f"{published}.{scale}.{part}"
        for j in range(MOST_BLOCKS):
            mine, theirs = f"{ours}levels.{{i}}.blocks.{j}", f"{published}.{block}.{j}"
            keys |= block_keys(mine, theirs, shortcut, part)
    return keys


def block_keys(ours: str, published: str, shortcut: str, part: str) -> dict[str, str]:
    """Published names of one parameter ("weight" or "bias") of a `ResidualBlock`."""
    names = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"shortcut": shortcut}
    return {f"{ours}.{a}.{part}": f"{published}.{b}.{part}" for a, b in names.items()}


MOST_BLOCKS = 8
"""Residual blocks per level that the tables of names hold."""


def grouped(shapes: Sequence[torch.Size]) -> list[list[int]]:
    """Indices of equal shapes together, in order of their first."""
    groups: dict[torch.Size, list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(i)
    return list(groups.values())
