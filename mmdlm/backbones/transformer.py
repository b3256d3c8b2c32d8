"""The one bidirectional transformer every family runs on.

A pre-norm decoder block without a causal mask; families differ by the switches of
`TransformerConfig` only. Maths: RMSNorm, optional norm of queries and keys, rotate-half rotary
embedding, grouped-query attention, SwiGLU (ML-GSAI/LLaDA, HKUNLP/Dream modelling files).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdlm.backbones.block import Block, Parts, RMSNorm, post_attention, qkv
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.kv import KV, Pass, Rows, indices, listed, take
from mmdlm.backbones.linear import Linear, linear, outputs
from mmdlm.backbones.rotary import Rotary

# A score this much lower has weight zero in every type, whatever the other scores are.
BLOCKED = -1e4


def embedding(count: int, width: int) -> nn.Embedding:
    """An `nn.Embedding`, not initialised on the meta device.

    There `normal_` would import torch._dynamo, which takes as long as importing torch.
    """
    weight = torch.empty(count, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head.

    Args:
        config: sizes and switches.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = embedding(config.vocab, config.width)
        self.rotary = Rotary(config.rotary_width, config.theta * config.theta_scale, config.rope)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps, config.norm_bias)
        self.out = None if config.tied else Linear(config.width, config.vocab, bias=config.bias)
        self.checkpointing = False
        self.step: Callable[..., Tensor] | None = None
        """`logits_step`, compiled; None in a model that is not."""

    def compile(self, backend: str | Callable = "inductor") -> None:
        """Compiles the blocks, and a whole cached step; see `MultimodalDLM.compile`.

        Args:
            backend: of `torch.compile`.
        """
        # Sizes are dynamic from the start: batch, computed and scored positions vary in a decode.
        parts = (torch.compile(p, dynamic=True, backend=backend) for p in (qkv, post_attention))
        compiled = Parts(*parts)
        for block in self.blocks:
            block.parts = compiled
        graphs = backend == "inductor" and self.embed.weight.device.type == "cuda"
        mode = "reduce-overhead" if graphs else None
        self.step = torch.compile(logits_step, dynamic=True, backend=backend, mode=mode)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draws fresh weights: normal, std 0.02; outputs of a residual scaled by its depth."""
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif "norm" in name:
                nn.init.ones_(weight)
            else:
                residual = name.endswith(("attn.o.weight", ".down.weight"))
                std = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
                nn.init.normal_(weight, std=std, generator=generator)

    def tokens(self, ids: Tensor) -> Tensor:
        """Embeddings [B M D] of token ids [B M]."""
        return self.embed(ids) * self.config.embed_scale

    def condition(self, x: Tensor, level: Tensor, soft: Tensor | None) -> Tensor:
        """Input embeddings [B M D] with what the previous step says of them; here nothing.

        Args:
            x: [B M D].
            level: [B M] int64, see `mmdlm.layout`.
            soft: [B M D] expected embeddings of the previous step; None for zeros.
        """
        return x

    def extras(
        self, level: Tensor, positions: Tensor, real: Tensor, rows: Rows, end: int
    ) -> dict[str, Any]:
        """Further arguments of `forward` that follow from the layout; here none.

        Args:
            level: [B L] int64, see `mmdlm.layout`.
            positions: [B L] int64.
            real: [B L] bool, False at padding.
            rows: positions that are computed.
            end: keys [0, end) are attended.
        """
        return {}

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        kv: KV | None = None,
        mask: Tensor | None = None,
        *,
        rows: Rows | None = None,
        read: Rows | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            x: [B M D] embeddings of the rows to compute.
            positions: [B M] rotary positions of these rows.
            kv: buffers that hold the rows not in x; None when x is the whole sequence.
            mask: bool, True = attend, or floating, added to the scores: [B M keys], or None for
                full attention; the keys are the rows of x, or the first `kv.end` rows of the
                canvas. Rows that may attend to nothing attend to everything.
            rows: the M canvas rows of x inside `kv`; None: all of them.
            read: the rows of x (counted within x) whose states are wanted; the last block
                computes nothing else for the others but keys and values. Without `kv`, also bool
                [B M], with another number of True in each batch row.
        Returns:
            [B R D], R = M when `read` is None; [N D] of the N True rows when it is bool.
        """
        chosen = None
        if isinstance(read, Tensor) and read.dtype == torch.bool:
            read, chosen = listed(read)
        if self.step is not None and isinstance(read, slice):  # a slice is compiled for its bounds
            read = indices(read, len(x), x.device)
        now = Pass(x, positions, finite(mask, x.dtype), slice(None) if rows is None else rows, read)
        last, at, cos_sin = len(self.blocks) - 1, None, None
        for i, block in enumerate(self.blocks):
            home = block.attn_norm.weight.device
            if now.x.device != home:  # the model is split over devices
                now = Pass(*moved(now, home))
            if kv is not None:
                now = kv.enter(i, now)
            if now.positions is not at:
                at, cos_sin = now.positions, self.rotary(now.positions)
            only = now.read if i == last and not (kv and kv.needs_all_queries) else None
            here = now.mask if only is None or now.mask is None else take(now.mask, only)
            rotary = (tuple(take_rows(t, only) for t in cos_sin), cos_sin)
            cache = None if kv is None else (kv, i, now.rows)
            kept = None if only is None else chosen
            args = (now.x, rotary, None if here is None else here[:, None], cache, only, kept)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)
            now = now._replace(x=x)
        if kv is not None and kv.needs_all_queries:
            x = kv.leave(now)
        return self.norm(x).to(self.embed.weight.device)

    def head(self, hidden: Tensor, columns: slice | None = None) -> Tensor:
        """Logits [... V] of hidden states, or of a range of token ids only.

        Args:
            hidden: [... D], what `forward` gave.
            columns: ids to score; a slice of the vocabulary costs its share of the head only.
        """
        if self.out is None:
            logits = linear(hidden, self.embed.weight, None, columns)
        else:
            logits = outputs(self.out, hidden, columns)
        return logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale

    def cache(self, batch: int, length: int) -> KV:
        """Empty key/value buffers for a canvas of the given length.

        Args:
            batch: B.
            length: L.
        """
        c = self.config
        kv = KV(
            c.layers,
            batch,
            c.keys_heads,
            length,
            c.head_width,
            device=[block.attn_norm.weight.device for block in self.blocks],
            dtype=self.embed.weight.dtype,
        )
        if self.step is not None:
            for buffer in (*kv.keys, *kv.values):  # CUDA graphs then write to it in place
                torch._dynamo.mark_static_address(buffer, guard=False)
        return kv


def logits_step(
    transformer: Transformer,
    x: Tensor,
    positions: Tensor,
    kv: KV,
    mask: Tensor | None,
    rows: Tensor,
    read: Tensor,
    columns: slice | None,
) -> Tensor:
    """Logits [B R V] float32 of one cached step, whose shapes stay the same from step to step.

    A function of the transformer, not a method: the compiled function of a copied model is not
    bound to the weights of the original.

    Args:
        transformer: the model.
        x: [B M D] embeddings of the positions to compute.
        positions: [B M] their rotary positions.
        kv: buffers with the other positions.
        mask: see `Transformer.forward`.
        rows: [B M] where they are on the canvas.
        read: [B R] which of the M positions are scored.
        columns: ids to score.
    """
    hidden = transformer(x, positions, kv, mask, rows=rows, read=read)
    return transformer.head(hidden, columns).float()


def moved(value: Any, device: torch.device) -> Any:
    """The tensors of nested tuples on another device; everything else as it is."""
    if isinstance(value, tuple):
        return tuple(moved(each, device) for each in value)
    return value.to(device) if isinstance(value, Tensor) else value


def take_rows(x: Tensor, rows: Rows | None) -> Tensor:
    """The chosen rows of [B 1 M C]."""
    return x if rows is None else take(x[:, 0], rows)[:, None]


def finite(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask with rows that may attend to nothing opened to all keys.

    Such rows (padding) are never read, but an empty softmax would make them NaN and a NaN value
    survives a multiplication with weight zero.

    Args:
        mask: bool or floating [B M keys], see `Transformer.forward`.
        dtype: type of a floating mask's result; attention takes that of its queries only.
    """
    if mask is None or mask.dtype == torch.bool:
        return None if mask is None else mask | ~mask.any(-1, keepdim=True)
    # "Blocked" is written as minus infinity or as the least number of some type, which the cast to
    # a narrower one, or autocast, makes minus infinity.
    empty = (mask <= BLOCKED).all(-1, keepdim=True)
    return mask.masked_fill(empty, 0.0).to(dtype)
