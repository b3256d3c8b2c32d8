"""Pre-norm block: RMSNorm, grouped-query attention with rotary positions, SwiGLU or experts.

The computations before and after the attention are separate functions that can be compiled
(`Parts`). The cache and the attention itself run between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.kv import KV, Rows, take
from mmdlm.backbones.linear import MLP, Linear, is_plain, outputs
from mmdlm.backbones.moe import MoE
from mmdlm.backbones.rotary import rotate


class RMSNorm(nn.Module):
    """x / root mean square, computed in float32 and cast back, times the weight."""

    def __init__(self, width: int, eps: float, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[... width] -> [... width], same dtype."""
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        h = h.to(x.dtype) * self.weight.to(x.dtype)
        return h if self.bias is None else h + self.bias


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int, scale: float | None = None
) -> Tensor:
    """Softmax attention [B H R hd]; each key head serves `group` consecutive query heads.

    Args:
        q: [B H R hd].
        k: [B KV M hd].
        v: [B KV M hd].
        mask: bool [B 1 R M], True = attend, or floating, added to the scores; None: attend to all.
        group: H / KV.
        scale: factor on the products of queries and keys; None: 1 / sqrt(hd).
    """
    if scale is not None:  # the kernels apply the usual one
        q = q * (scale * q.shape[-1] ** 0.5)
    half = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    if group > 1 and mask is not None and q.device.type == "cuda":
        # CUDA kernels with a mask need one key head per query head.
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    if not (half and q.requires_grad):
        if half and len(q) > 1 and mask is not None and mask.dtype == torch.bool:
            return _attend_unpadded(q, k, v, mask, group > 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=group > 1)
    # The bfloat16 backward of the fused CPU kernel is three times slower than this.
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


def _attend_unpadded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, gqa: bool) -> Tensor:
    """Attention of each batch row over its own keys, without the padding at both ends.

    The fused kernel sums over keys in blocks that begin at the first key. Padding before a row
    shifts them, which in bfloat16 changes results by up to a rounding step (2 ** -8).
    """
    seen = mask.any(2)[:, 0].int()  # [B M]
    first, last = seen.argmax(1), seen.shape[1] - seen.flip(1).argmax(1)
    rows = []
    for i, keys in enumerate(map(slice, first.tolist(), last.tolist())):
        one = slice(i, i + 1)
        at = (one, slice(None), keys)
        rows.append(
            F.scaled_dot_product_attention(
                q[one], k[at], v[at], attn_mask=mask[one, ..., keys], enable_gqa=gqa
            )
        )
    return torch.cat(rows)


class Attention(nn.Module):
    """Weights of grouped-query attention; queries, keys and values come from one projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.keys_heads
        self.head_dim = config.head_width
        self.float32 = config.rotary_float32
        self.clip = config.clip
        self.q_size, self.kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv = Linear(
            config.width, self.q_size + 2 * self.kv_size, bias=config.qkv_bias or config.bias
        )
        self.o = Linear(self.q_size, config.width, bias=config.o_bias or config.bias)
        self.per_head = config.qk_norm == "head"
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            q_width = self.head_dim if self.per_head else self.q_size
            k_width = self.head_dim if self.per_head else self.kv_size
            self.q_norm = RMSNorm(q_width, config.eps, config.norm_bias)
            self.k_norm = RMSNorm(k_width, config.eps, config.norm_bias)

    def project(self, x: Tensor, read: Rows | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B H R hd] of the read rows; keys and values [B KV M hd] of all rows."""
        if read is None or not is_plain(self.qkv):
            q, k, v = self.qkv(x).split([self.q_size, self.kv_size, self.kv_size], -1)
            q = take(q, read)
        else:
            keys = slice(self.q_size, self.q_size + 2 * self.kv_size)
            q = outputs(self.qkv, take(x, read), slice(0, self.q_size))
            k, v = outputs(self.qkv, x, keys).chunk(2, -1)
        if self.q_norm is not None and not self.per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        # Not einops: its overhead per call is longer than a GPU kernel.
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.q_norm is not None and self.per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        return q, k, v

    def values(self, x: Tensor) -> Tensor:
        """Values alone of all rows, [B M KV hd]; see `project`."""
        if not is_plain(self.qkv):
            return self.project(x, None)[2].transpose(1, 2)
        start = self.q_size + self.kv_size
        v = outputs(self.qkv, x, slice(start, start + self.kv_size))
        v = v.unflatten(-1, (-1, self.head_dim))
        return v if self.clip is None else v.clamp(-self.clip, self.clip)


Angles = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Cosines and sines of queries and of keys."""


class Parts(NamedTuple):
    """The computations before and after the attention, eager or compiled.

    Functions that take the block, not methods: one compiled function serves all blocks, and a
    copied block is not bound to the weights of the original.
    """

    qkv: Callable[[Block, Tensor, Angles, Rows | None], tuple[Tensor, Tensor, Tensor]]
    post_attention: Callable[[Block, Tensor, Tensor], Tensor]


def qkv(
    block: Block, x: Tensor, rotary: Angles, read: Rows | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [B H R hd] of the read rows, keys and values [B KV M hd] of all M in x."""
    q, k, v = block.attn.project(block.attn_norm(x), read)
    queries, keys = rotary
    float32 = block.attn.float32
    return rotate(q, *queries, float32), rotate(k, *keys, float32), v


def post_attention(block: Block, x: Tensor, y: Tensor) -> Tensor:
    """Output projection, residual and feed-forward: [B R D] of x [B R D] and y [B R H*hd]."""
    x = x + block.attn.o(y)
    feed_forward = block.mlp if block.moe is None else block.moe
    return x + feed_forward(block.mlp_norm(x))


class Block(nn.Module):
    """Pre-norm attention and MLP or experts, with residuals."""

    parts = Parts(qkv, post_attention)

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.eps, config.norm_bias)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.eps, config.norm_bias)
        sparse = config.is_sparse(layer)
        self.mlp = None if sparse else MLP(config.width, config.inner, config.bias)
        self.moe = MoE(config.width, config.moe) if sparse else None

    def forward(
        self,
        x: Tensor,
        rotary: Angles,
        mask: Tensor | None,
        cache: tuple[KV, int, Rows] | None,
        read: Rows | None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """[B R D] of the read rows; all rows of x serve as keys and values.

        With `kept`, bool [B R], only [N D] of the N True ones among them.
        """
        q, k, v = self.parts.qkv(self, x, rotary, read)
        if cache is not None:
            kv, layer, rows = cache
            k, v = kv.write(layer, k, v, rows)
            kv.watch(layer, q, rows)
        y = attend(q, k, v, mask, self.attn.heads // self.attn.kv_heads)
        x, y = take(x, read), y.transpose(1, 2).flatten(2)
        if kept is not None:
            x, y = x[kept], y[kept]
        return self.parts.post_attention(self, x, y)
