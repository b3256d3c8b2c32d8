"""DiffusionGemma's transformer: one set of weights that encodes text and denoises a canvas.

Prompt tokens and finished text run as in the encoder of the source: causal, images bidirectional.
The open canvas runs as in its decoder: bidirectional over everything before it, with the
probabilities of the previous step as a second input (self-conditioning). Which of both a position
is follows from its level, see "canvas" in `mmdlm.layout`.

Source: huggingface/transformers: models/diffusion_gemma/modeling_diffusion_gemma.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdlm.backbones.block import attend
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.kv import KV, Rows, take
from mmdlm.backbones.linear import linear
from mmdlm.backbones.rotary import Rotary, rotate
from mmdlm.backbones.transformer import Transformer, embedding, finite


def is_canvas(level: Tensor) -> Tensor:
    """Whether positions are part of an open canvas, bool [B L] of levels [B L]."""
    return level % 2 == 1


class Norm(nn.Module):
    """RMSNorm in float32, the weight included; without a weight if `scale` is False."""

    def __init__(self, width: int, eps: float, scale: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        """[... width], same dtype."""
        h = x.float()
        h = h * (h.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (h if self.weight is None else h * self.weight.float()).to(x.dtype)


class GatedMLP(nn.Module):
    """GELU (tanh) of one projection times another one, projected back."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[... width]."""
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class Experts(nn.Module):
    """Mixture of experts beside the MLP; the router sees the residual, the experts its norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        g, width = config.gemma, config.width
        self.top = g.top
        self.norm = Norm(width, config.eps, scale=False)
        self.router = nn.Linear(width, g.experts, bias=False)
        self.scale = nn.Parameter(torch.ones(width))
        self.expert_scale = nn.Parameter(torch.ones(g.experts))
        self.gate_up = nn.Parameter(torch.empty(g.experts, 2 * g.expert_inner, width))
        self.down = nn.Parameter(torch.empty(g.experts, width, g.expert_inner))

    def forward(self, residual: Tensor, normed: Tensor) -> Tensor:
        """[B M D]."""
        x, flat = normed.flatten(0, 1), residual.flatten(0, 1)
        scores = self.router(self.norm(flat) * self.scale * flat.shape[-1] ** -0.5)
        share, chosen = scores.softmax(-1, dtype=torch.float32).topk(self.top, -1)
        share = share / share.sum(-1, keepdim=True) * self.expert_scale[chosen]
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], self.gate_up[expert]).chunk(2, -1)
            found = F.linear(F.gelu(gate, approximate="tanh") * up, self.down[expert])
            out.index_add_(0, token, (found * share[token, place, None]).to(out.dtype))
        return out.view_as(normed)


class GemmaBlock(nn.Module):
    """Attention, and MLP and experts side by side, with norms before and after each."""

    def __init__(self, config: TransformerConfig, is_full: bool) -> None:
        super().__init__()
        g, width, eps = config.gemma, config.width, config.eps
        self.head_dim = g.full_head_dim if is_full else config.head_width
        kv_heads = g.full_kv_heads if is_full else config.keys_heads
        self.group = config.heads // kv_heads
        self.attn_norm = Norm(width, eps)
        self.q = nn.Linear(width, config.heads * self.head_dim, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v = None if is_full else nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(config.heads * self.head_dim, width, bias=False)
        self.q_norm, self.k_norm = Norm(self.head_dim, eps), Norm(self.head_dim, eps)
        self.v_norm = Norm(self.head_dim, eps, scale=False)
        self.post_attn_norm = Norm(width, eps)
        self.mlp_norm, self.mlp, self.post_mlp_norm = (
            Norm(width, eps),
            GatedMLP(width, config.inner),
            Norm(width, eps),
        )
        self.moe_norm, self.moe, self.post_moe_norm = (
            Norm(width, eps),
            Experts(config),
            Norm(width, eps),
        )
        self.post_norm = Norm(width, eps)
        # Factors of the output in the two passes of the source; they are not trained.
        self.encoder_scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.decoder_scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        canvas: Tensor | None,
        cache: tuple[KV, int, Rows] | None,
    ) -> Tensor:
        """[B M D]; `canvas` is bool [B M], None for a canvas only."""
        h = self.attn_norm(x)
        k = self.k(h)
        q, k, v = (
            each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for each in (self.q(h), k, k if self.v is None else self.v(h))
        )
        q, k = (rotate(n(t), *rotary, False) for n, t in ((self.q_norm, q), (self.k_norm, k)))
        v = self.v_norm(v)
        if cache is not None:
            kv, layer, rows = cache
            k, v = kv.write(layer, k, v, rows)
        y = attend(q, k, v, mask, self.group, scale=1.0).transpose(1, 2).flatten(2)
        x = x + self.post_attn_norm(self.o(y))
        dense = self.post_mlp_norm(self.mlp(self.mlp_norm(x)))
        sparse = self.post_moe_norm(self.moe(x, self.moe_norm(x)))
        x = x + self.post_norm(dense + sparse)
        if canvas is None:
            return x * self.decoder_scale
        return x * torch.where(canvas[..., None], self.decoder_scale, self.encoder_scale)


class Proportional(Rotary):
    """Rotary frequencies of a whole head of which only the first ones are not zero.

    Args:
        dim: width of a head.
        base: theta.
        part: share of the frequencies that rotate.
    """

    def __init__(self, dim: int, base: float, part: float) -> None:
        super().__init__(dim, base)
        self.turning = int(part * dim // 2)

    def _compute(self, device: torch.device, length: int | None) -> None:
        super()._compute(device, length)
        self.frequency[self.turning :] = 0


class SelfConditioning(nn.Module):
    """What a position was likely to hold in the previous step, added to what it shows."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = Norm(config.width, config.eps)
        self.mlp = GatedMLP(config.width, config.inner)
        self.post_norm = Norm(config.width, config.eps, scale=False)

    def forward(self, x: Tensor, soft: Tensor) -> Tensor:
        """[B M D] of embeddings [B M D] and expected embeddings [B M D], zero at first."""
        return self.post_norm(x + self.mlp(self.norm(soft)))


class Gemma(Transformer):
    """Embedding, blocks, final norm and a head with a soft cap; see the module's docstring.

    Args:
        config: sizes and switches, with `gemma`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        nn.Module.__init__(self)
        self.config, g = config, config.gemma
        self.embed = embedding(config.vocab, config.width)
        self.full = frozenset(g.full)
        self.rotary = nn.ModuleList(
            (
                Rotary(config.head_width, config.theta),
                Proportional(g.full_head_dim, g.full_theta, g.full_rotary),
            )
        )
        self.blocks = nn.ModuleList(
            GemmaBlock(config, i in self.full) for i in range(config.layers)
        )
        self.norm = Norm(config.width, config.eps)
        self.conditioning = SelfConditioning(config)
        self.out, self.step, self.checkpointing = None, None, False

    def compile(self, backend: str | Callable = "inductor") -> None:
        """Compiles nothing: not supported for this transformer.

        Raises:
            ValueError: always.
        """
        raise ValueError("compile is not supported for DiffusionGemma; leave compile=True out")

    def tokens(self, ids: Tensor) -> Tensor:
        """Embeddings [B M D] of token ids [B M]; the factor is rounded to the weights' type."""
        weight = self.embed.weight
        return self.embed(ids) * torch.tensor(math.sqrt(self.config.width), dtype=weight.dtype)

    def soft(self, logits: Tensor) -> Tensor:
        """Expected embeddings [B R D] under logits [B R V]."""
        weight = self.embed.weight
        probability = logits.softmax(-1, dtype=torch.float32).to(weight.dtype)
        return probability @ weight * torch.tensor(math.sqrt(self.config.width), dtype=weight.dtype)

    def condition(self, x: Tensor, level: Tensor, soft: Tensor | None) -> Tensor:
        """Input embeddings with self-conditioning at the open canvas, see `Transformer`."""
        soft = torch.zeros_like(x) if soft is None else soft.to(x)
        return torch.where(is_canvas(level)[..., None], self.conditioning(x, soft), x)

    def extras(
        self, level: Tensor, positions: Tensor, real: Tensor, rows: Rows, end: int
    ) -> dict[str, Any]:
        """Attention mask of the layers with a window, and where the open canvas is.

        A token sees the window that ends with it, and its whole image; every token of a canvas
        sees the window before the canvas.
        """
        begins = level != torch.cat([level[:, :1] - 1, level[:, :-1]], 1)
        begin = positions.masked_fill(~begins, -1).cummax(1).values
        base = take(torch.where(is_canvas(level), begin, positions), rows)
        query, own = take(level, rows), level[:, None, :end]
        near = positions[:, None, :end] > base[..., None] - self.config.gemma.window
        near = near | (own == query[..., None])
        seen = (own <= query[..., None]) & near & real[:, None, :end]
        return {"window": seen, "canvas": is_canvas(query)}

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        kv: KV | None = None,
        mask: Tensor | None = None,
        *,
        rows: Rows | None = None,
        read: Rows | None = None,
        window: Tensor | None = None,
        canvas: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, see `Transformer.forward`.

        Args:
            x: [B M D].
            positions: [B M].
            kv: buffers that hold the rows not in x.
            mask: bool [B M keys] of the layers with full attention.
            rows: the M canvas rows of x inside `kv`.
            read: the rows of x whose states are wanted, or bool [B M].
            window: bool [B M keys] of the other layers; None: as `mask`.
            canvas: bool [B M], the open canvas; None: all of x.
        """
        if window is None:
            window = mask
        elif mask is not None:
            window = window & mask
        masks = [None if m is None else finite(m, x.dtype)[:, None] for m in (window, mask)]
        turns = [each(positions) for each in self.rotary]
        for i, block in enumerate(self.blocks):
            cache = None if kv is None else (kv, i, slice(None) if rows is None else rows)
            kind = i in self.full
            x = block(x, turns[kind], masks[kind], canvas, cache)
        is_flags = isinstance(read, Tensor) and read.dtype == torch.bool
        return self.norm(x[read] if is_flags else take(x, read))

    def head(self, hidden: Tensor, columns: slice | None = None) -> Tensor:
        """Logits [... V] float32 within the soft cap, see `Transformer.head`."""
        cap = self.config.gemma.softcap
        return torch.tanh(linear(hidden, self.embed.weight, None, columns).float() / cap) * cap

    def cache(self, batch: int, length: int) -> KV:
        """Empty key/value buffers for a canvas of the given length.

        Args:
            batch: B.
            length: L.
        """
        c, g = self.config, self.config.gemma
        full = [i in self.full for i in range(c.layers)]
        return KV(
            c.layers,
            batch,
            [g.full_kv_heads if each else c.keys_heads for each in full],
            length,
            [g.full_head_dim if each else c.head_width for each in full],
            device=[block.attn_norm.weight.device for block in self.blocks],
            dtype=self.embed.weight.dtype,
        )
