"""Blocks of a vision transformer between which tokens are merged (ToMe)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Merging(Protocol):
    """Which tokens are merged, see `adapters.prune_tome_tower.ToMeTower`."""

    def plan(self, tokens: int, depth: int) -> list[int]:
        """Number of tokens merged in each of `depth` blocks, of `tokens` at first."""

    def step(
        self, x: Tensor, keys: Tensor, size: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Merges `count` pairs of tokens: the rest [B K E], its sizes [B K 1], its places [B K].

        Args:
            x: [B N E].
            keys: [B N C] attention keys, the mean over heads.
            size: [B N 1] float32, patches that each token stands for.
            count: see `plan`.
        """


def is_mergeable(block: nn.Module) -> bool:
    """Whether a block is a pre-norm block of ours or timm's; its attention has no gate or norm."""
    attention = getattr(block, "attn", None)
    extra = [getattr(attention, name, None) for name in ("gate", "norm")]
    return (
        isinstance(getattr(attention, "qkv", None), nn.Linear)
        and all(hasattr(block, name) for name in ("norm1", "norm2", "mlp"))
        and all(part is None or isinstance(part, nn.Identity) for part in extra)
    )


def run(
    vit: nn.Module, images: Tensor, counts: list[int], merging: Merging
) -> tuple[Tensor, Tensor]:
    """Tokens [B K E] of images in the order of their places, and the places [B K].

    Tokens are merged after the attention of a block, before its MLP. A token that stands for n
    patches is attended to as n equal tokens are: log(n) is added to its scores.

    Source: ToMe (arXiv 2210.09461; facebookresearch/ToMe: tome/patch/timm.py).

    Args:
        vit: transformer without class token, ours or timm's, whose blocks are mergeable.
        images: [B 3 Y X].
        counts: tokens merged in each block.
        merging: chooses them.
    """
    x = _embedded(vit, images)  # [B N E]
    total = x.shape[1]
    places = torch.arange(total, device=x.device).expand(x.shape[:2])
    size = torch.ones_like(x[..., :1], dtype=torch.float32)
    for block, count in zip(vit.blocks, counts, strict=True):
        mixed, keys = _attend(block.attn, block.norm1(x), size if x.shape[1] < total else None)
        x = x + _part(block, "ls1", mixed)
        if count:
            x, size, order = merging.step(x, keys, size, count)
            places = places.gather(1, order)
        x = x + _part(block, "ls2", block.mlp(block.norm2(x)))
    back = places.argsort(1)
    x = vit.norm(x).gather(1, back[..., None].expand(x.shape))
    return x, places.gather(1, back)


def _embedded(vit: nn.Module, images: Tensor) -> Tensor:
    """[B N E] what the first block gets."""
    if hasattr(vit, "_pos_embed"):  # timm's
        return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    return vit.patch_embed(images) + vit.pos_embed


def _part(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """The output of a part that only some modules have, such as a layer scale."""
    part = getattr(module, name, None)
    return x if part is None else part(x)


def _attend(attention: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """What tokens [B N E] get from others that stand for several, and their keys [B N C].

    Args:
        attention: of ours or timm's.
        x: [B N E].
        size: [B N 1] float32, patches that each token stands for; None: one.
    """
    heads = getattr(attention, "heads", None) or attention.num_heads
    q, k, v = attention.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = _part(attention, "q_norm", q), _part(attention, "k_norm", k)  # [B H N C]
    bias = None if size is None else size.log().to(q.dtype).mT[:, None]  # [B 1 1 N]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention.proj(mixed.transpose(1, 2).flatten(2)), k.mean(1)
