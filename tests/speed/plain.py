"""Plain sampler: masked diffusion as in the published samplers, the baseline of our decode.

As published, all positions go through the head with a float64 softmax over the vocabulary, cached
keys are concatenated in every layer and rotated again in every step, and the batch size is one. It
shares no code with `mmdlm.decoding` or `Transformer.forward`, so equal tokens are independent
results, and its time is that of the published samplers.

Sources: ML-GSAI/LLaDA: generate.py (none); NVlabs/Fast-dLLM: llada/generate.py (prefix, dual);
jacklishufan/LaViDa: llava/model/language_model/llada/generate.py (prefix-lm). Two differences: the
mask id is never committed, and ids can be limited to a range.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.backbones.block import Block, RMSNorm
from mmdlm.backbones.config import TransformerConfig
from mmdlm.model import MultimodalDLM

MODES = ("none", "prefix", "dual", "prefix-lm")
"""none: every step computes prompt and canvas. prefix: each block starts with a full forward, then
steps compute from the block on with cached keys before it. dual: steps compute only the block.
prefix-lm: the prompt is computed once, alone, then steps compute the canvas."""

Past = list[tuple[Tensor, Tensor]]
"""Keys before rotary and values [1 KV n hd] of each layer."""


@dataclass(frozen=True)
class Found:
    """Result of a plain decode.

    Args:
        tokens: [1 P+G] int64.
        forwards: number of backbone forwards.
    """

    tokens: Tensor
    forwards: int


@dataclass(frozen=True)
class Schedule:
    """A decoding schedule.

    Args:
        length: positions G of the answer.
        block: positions per block; divides the length.
        steps: for the whole answer; the number of blocks divides it.
        threshold: probability at which tokens commit, instead of steps.
        columns: ids that may be committed; None for all.
    Raises:
        ValueError: length, blocks or steps are not divisible, as in the published samplers.
    """

    length: int
    block: int
    steps: int | None = None
    threshold: float | None = None
    columns: slice | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.threshold is None):
            raise ValueError("Schedule: give either steps or a threshold")
        if self.length % self.block:
            raise ValueError(
                f"Schedule: length {self.length} is not a multiple of block {self.block}"
            )
        if self.steps is not None and (self.steps < 1 or self.steps % self.blocks):
            raise ValueError(
                f"Schedule: steps {self.steps} are not a multiple of the {self.blocks} blocks"
            )

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.length // self.block

    def quotas(self) -> Iterator[int | None]:
        """Tokens to commit in each step of a block; None with a threshold."""
        if self.steps is None:
            while True:
                yield None
        share, rest = divmod(self.block, self.steps // self.blocks)
        for step in range(self.steps // self.blocks):
            yield share + (step < rest)


class Plain:
    """A plain sampler with the weights of one of our models, which are not copied.

    Args:
        model: text model with full attention.
    Raises:
        ValueError: the model has a feature that the published samplers do not support.
    """

    def __init__(self, model: MultimodalDLM) -> None:
        config, spec = model.spec.transformer, model.spec
        unusual = {
            "moe": config.moe is not None,
            "qk_norm": config.qk_norm != "none",
            "clip": config.clip is not None,
            "rotary": config.rotary != 1.0,
            "norm_bias": config.norm_bias,
            "shift": spec.shift,
            "attention": spec.attention != "full",
        }
        if any(unusual.values()):
            names = ", ".join(name for name, is_set in unusual.items() if is_set)
            raise ValueError(f"Plain runs LLaDA-like models only; this one differs in {names}")
        self.config, self.mask_id = config, spec.mask_id
        backbone = model.backbone
        self.embed, self.norm = backbone.embed.weight, backbone.norm
        self.layers = [_split(block, config) for block in backbone.blocks]
        self.head = (self.embed, None)
        if backbone.out is not None:
            self.head = (backbone.out.weight, backbone.out.bias)
        self.forwards = 0

    @torch.inference_mode()
    def decode(self, prompt: Tensor, mode: str, schedule: Schedule) -> Found:
        """A prompt with its answer.

        Args:
            prompt: [1 P] int64.
            mode: one of `MODES`.
            schedule: how the answer is filled.
        Raises:
            ValueError: the mode is unknown, or there is more than one row.
        """
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is unknown; expected one of {', '.join(MODES)}")
        if prompt.ndim != 2 or len(prompt) != 1:
            raise ValueError(f"prompt is {list(prompt.shape)}, expected one row [1 P]")
        size = prompt.shape[1]
        x = torch.full((1, size + schedule.length), self.mask_id, device=prompt.device)
        x[:, :size] = prompt
        self.forwards = 0
        self.cos, self.sin = self._angles(x.shape[1], x.device)
        past: Past = []
        if mode == "prefix-lm":
            past = self.forward(prompt, 0)[1]  # its logits are computed, and not looked at
        for index in range(schedule.blocks):
            start = size + index * schedule.block
            self._block(x, mode, schedule, start, past, size)
        return Found(x, self.forwards)

    def _block(
        self, x: Tensor, mode: str, schedule: Schedule, start: int, past: Past, size: int
    ) -> None:
        """Fills the block that starts at a canvas position, in place."""
        stop, total = start + schedule.block, x.shape[1]
        before, after = past, []
        for step, quota in enumerate(schedule.quotas()):
            if not bool((x[:, start:stop] == self.mask_id).any()):
                break
            if mode == "prefix-lm":
                first, last = size, total
            elif mode == "none" or step == 0:
                first, last = 0, total
            else:
                first, last = start, stop if mode == "dual" else total
            logits, kept = self.forward(x[:, first:last], first, before, after)
            if mode in ("prefix", "dual") and step == 0:
                before = [(k[:, :, :start], v[:, :, :start]) for k, v in kept]
                if mode == "dual":
                    after = [(k[:, :, stop:], v[:, :, stop:]) for k, v in kept]
            self._commit(x[:, first:last], logits, stop - first, quota, schedule)

    def forward(
        self, ids: Tensor, first: int, before: Past | None = None, after: Past | None = None
    ) -> tuple[Tensor, Past]:
        """Logits [1 M V] of all rows, and keys and values of the rows and all that was cached.

        Args:
            ids: [1 M] int64.
            first: canvas position of the first one.
            before: what is cached of the positions before them.
            after: what is cached of the positions after them.
        """
        return self.compute(
            F.embedding(ids, self.embed) * self.config.embed_scale, first, before, after
        )

    def compute(
        self, x: Tensor, first: int, before: Past | None = None, after: Past | None = None
    ) -> tuple[Tensor, Past]:
        """The same of embeddings [1 M D]."""
        self.forwards += 1
        kept: Past = []
        for index, layer in enumerate(self.layers):
            h = _norm(x, layer["attn_norm"])
            q, k, v = (self._heads(F.linear(h, *layer[name])) for name in ("q", "k", "v"))
            k = torch.cat([*_of(before, index, 0), k, *_of(after, index, 0)], 2)
            v = torch.cat([*_of(before, index, 1), v, *_of(after, index, 1)], 2)
            kept.append((k, v))
            q = self._rotate(q, first)
            k = self._rotate(k, 0)
            group = self.config.heads // self.config.keys_heads
            if group > 1:
                k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            y = F.scaled_dot_product_attention(q, k, v)
            y = y.transpose(1, 2).flatten(2)  # [1 M D]
            x = x + F.linear(y, *layer["o"])
            h = _norm(x, layer["mlp_norm"])
            h = F.silu(F.linear(h, *layer["gate"])) * F.linear(h, *layer["up"])
            x = x + F.linear(h, *layer["down"])
        logits = F.linear(_norm(x, self.norm), *self.head)
        return logits * self.config.logit_scale, kept

    def _heads(self, x: Tensor) -> Tensor:
        """[1 M H*hd] -> [1 H M hd]."""
        return x.reshape(*x.shape[:2], -1, self.config.head_width).transpose(1, 2)

    def _angles(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [L hd] of positions 0 to L."""
        width, base = self.config.head_width, self.config.theta * self.config.theta_scale
        steps = torch.arange(0, width, 2, device=device, dtype=torch.float32)
        places = torch.arange(length, device=device, dtype=torch.float32)
        angles = torch.outer(places, 1.0 / base ** (steps / width)).repeat(1, 2)
        return angles.cos(), angles.sin()

    def _rotate(self, x: Tensor, first: int) -> Tensor:
        """Rotates [1 H M hd] to the positions from `first` on, in the precision of the model."""
        cos, sin = (t[first : first + x.shape[2]] for t in (self.cos, self.sin))
        if not self.config.rotary_float32:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return (x * cos + turned * sin).to(x.dtype)

    def _commit(
        self, x: Tensor, logits: Tensor, stop: int, quota: int | None, schedule: Schedule
    ) -> None:
        """Commits tokens of a step to positions [1 M] of the canvas, before `stop`."""
        logits[..., self.mask_id] = -torch.inf
        columns = schedule.columns or slice(0, logits.shape[-1])
        logits = logits[..., columns]
        best = logits.argmax(-1)
        share = F.softmax(logits.to(torch.float64), -1)
        confidence = share.gather(-1, best[..., None])[..., 0]
        confidence[:, stop:] = -torch.inf
        is_mask = x == self.mask_id
        confidence = torch.where(is_mask, confidence, -torch.inf)
        best = torch.where(is_mask, best + columns.start, x)
        count = int(is_mask[:, :stop].sum()) if quota is None else quota
        taken = torch.zeros_like(is_mask)
        for rank, place in enumerate(confidence[0].topk(count).indices):
            # One host sync per candidate, as published.
            if quota is None and rank and confidence[0, place] < schedule.threshold:
                break
            taken[0, place] = True
        x[taken] = best[taken]


def _of(past: Past | None, layer: int, which: int) -> list[Tensor]:
    """Nothing, or the cached keys (0) or values (1) of a layer."""
    return [past[layer][which]] if past else []


def _norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """RMSNorm in float32."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * h.to(x.dtype)


def _split(block: Block, config: TransformerConfig) -> dict[str, Any]:
    """One layer as seven weights with their biases; fused weights are split as views."""
    queries, keys = (config.head_width * n for n in (config.heads, config.keys_heads))

    def parts(linear: torch.nn.Linear, *sizes: int) -> list[tuple[Tensor, Tensor | None]]:
        weights = linear.weight.split(sizes)
        biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(sizes)
        return list(zip(weights, biases, strict=True))

    q, k, v = parts(block.attn.qkv, queries, keys, keys)
    gate, up = parts(block.mlp.gate_up, config.inner, config.inner)
    return {
        "attn_norm": block.attn_norm,
        "mlp_norm": block.mlp_norm,
        **{"q": q, "k": k, "v": v, "gate": gate, "up": up},
        "o": (block.attn.o.weight, block.attn.o.bias),
        "down": (block.mlp.down.weight, block.mlp.down.bias),
    }
