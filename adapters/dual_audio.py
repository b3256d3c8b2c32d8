"""DIFFA's two audio connectors: downsampled frames for content, a Q-Former for sound and style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.adapter import Adapter
from encoders.checks import Count, CountOrZero, UnitFloat
from encoders.features import Features

PROMPTS = 20
"""Trainable prompt vectors in front of the semantic tokens in stage 1."""
DOWNSAMPLE = 4
"""Encoder frames per semantic token."""
LAYER = "acoustic_connector.qformer.layer.{i}"


class DualAudio(Adapter):
    """Semantic tokens of every fourth frame, after prompt vectors or after acoustic tokens.

    Stage 1 (speech recognition) gives 20 trainable prompt vectors followed by the semantic tokens;
    stage 2 (instructions) gives the acoustic tokens, then the semantic tokens. A checkpoint of
    either stage holds the weights of both, so both are kept; those the stage does not use need no
    gradient.

    The acoustic connector reads chosen layers of the encoder (`Features.hidden`) over the whole
    window, silence included. The semantic connector reads the tokens of the clip only.

    Source: DIFFA (arXiv 2507.18452; NKU-HLT/DIFFA: src/modeling_DIFFA.py, src/subsample.py). There
    clips under four frames fail, and a clip in a batch also gets the tokens of its padding.

    Args:
        in_dim: encoder width E.
        out_dim: backbone width D.
        layers: encoder layers that the acoustic connector reads; 0 for none, which leaves stage 1.
        heads: attention heads of the Q-Former, those of the encoder in published models.
        prompt_size: acoustic tokens.
        inner: feed-forward width of the Q-Former; 3072 at every encoder width, as published.
        stage: 1 or 2; None is 2 where there is an acoustic connector.
        dropout: of the Q-Former while training.
    Raises:
        ValueError: stage 2 without layers, or `heads` does not divide the width.
    """

    # Ours to published.
    KEYS: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "prompts": "trainable_prompts.weight",
        "acoustic.queries.{i}": "acoustic_connector.layer_prompts.{i}",
        "acoustic.layer_weights": "acoustic_connector.layer_weights",
        **{
            f"{ours}.{part}": f"{theirs}.{part}"
            for part in ("weight", "bias")
            for ours, theirs in {
                "semantic.conv1": "semantic_connector.conv.0",
                "semantic.conv2": "semantic_connector.conv.2",
                "semantic.linear1": "semantic_connector.linear_connector.0",
                "semantic.linear2": "semantic_connector.linear_connector.2",
                "semantic.norm": "semantic_connector.layernorm",
                "acoustic.norm": "acoustic_connector.proj.0",
                "acoustic.project": "acoustic_connector.proj.1",
            }.items()
        },
        **{
            f"acoustic.blocks.{{i}}.{ours}.{part}": f"{LAYER}.{theirs}.{part}"
            for part in ("weight", "bias")
            for ours, theirs in {
                "self_attention.q": "attention.self.query",
                "self_attention.k": "attention.self.key",
                "self_attention.v": "attention.self.value",
                "self_attention.out": "attention.output.dense",
                "self_attention.norm": "attention.output.LayerNorm",
                "cross_attention.q": "crossattention.self.query",
                "cross_attention.k": "crossattention.self.key",
                "cross_attention.v": "crossattention.self.value",
                "cross_attention.out": "crossattention.output.dense",
                "cross_attention.norm": "crossattention.output.LayerNorm",
                "up": "intermediate.dense",
                "down": "output.dense",
                "norm": "output.LayerNorm",
            }.items()
        },
    }

    def __init__(
        self,
        in_dim: Count,
        out_dim: Count,
        layers: CountOrZero = 0,
        heads: Count = 12,
        prompt_size: Count = 64,
        inner: Count = 3072,
        stage: Literal[1, 2] | None = None,
        dropout: UnitFloat = 0.1,
    ) -> None:
        super().__init__(in_dim, out_dim)
        self.stage = (2 if layers else 1) if stage is None else stage
        if self.stage == 2 and layers < 1:
            raise ValueError(
                f"DualAudio: stage=2 with layers={layers}; the acoustic connector needs at least "
                "one encoder layer, or choose stage=1"
            )
        self.prompts = nn.Parameter(torch.randn(PROMPTS, out_dim))
        self.semantic = _Semantic(in_dim, out_dim)
        self.acoustic = (
            _Acoustic(in_dim, out_dim, layers, heads, prompt_size, inner, dropout)
            if layers
            else None
        )
        if self.stage == 2:
            self.prompts.requires_grad_(False)
        elif self.acoustic is not None:
            self.acoustic.requires_grad_(False)

    def forward(self, features: Features) -> Features:
        """Audio tokens of width D: prompts or acoustic tokens, then the semantic tokens.

        Args:
            features: tokens [B N E], each clip's from the left; in stage 2 with the hidden states
                [B N' E] of the layers.
        Returns:
            tokens [B M D]; every row has max(1, n // 4) semantic tokens for its n frames.
        Raises:
            ValueError: stage 2, and the features hold other than `layers` hidden states.
        """
        tokens, mask = self.semantic(features.tokens, features.mask)
        if self.stage == 1:
            first = self.prompts.expand(len(tokens), -1, -1)
        else:
            first = self.acoustic(self._hidden(features))
        real = mask.new_ones(first.shape[:2])
        return Features(torch.cat([first, tokens], 1), torch.cat([real, mask], 1))

    def _hidden(self, features: Features) -> tuple[Tensor, ...]:
        """[B N' E] hidden states of each of the chosen layers."""
        hidden, expected = features.hidden or (), len(self.acoustic.queries)
        if len(hidden) != expected:
            raise ValueError(
                f"DualAudio: features hold {len(hidden)} hidden states, expected {expected}; "
                "construct the encoder with hidden_layers"
            )
        return hidden


class _Semantic(nn.Module):
    """Convolutions that take four frames to one token, then a projection."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(in_dim, in_dim, 3, padding=1)
        self.conv2 = nn.Conv1d(in_dim, DOWNSAMPLE * in_dim, 3, stride=DOWNSAMPLE, padding=1)
        self.linear1 = nn.Linear(DOWNSAMPLE * in_dim, in_dim)
        self.linear2 = nn.Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B M D] and their mask [B M] of frames [B N E] with the mask [B N].

        A token reads the frames 4 m - 2 to 4 m + 2, so those of a clip with n >= 4 frames never
        read frames from n on. Shorter clips are padded with zeros to one token.
        """
        count = max(DOWNSAMPLE, x.shape[1] - x.shape[1] % DOWNSAMPLE)
        x = torch.where(mask[..., None], x, 0)
        x = F.pad(x, (0, 0, 0, max(0, count - x.shape[1])))[:, :count]
        x = F.gelu(self.conv1(rearrange(x, "b n e -> b e n")))
        x = rearrange(self.conv2(x), "b e m -> b m e")
        x = self.norm(F.relu(self.linear2(F.relu(self.linear1(x)))))
        frames = mask.sum(1)
        tokens = (frames // DOWNSAMPLE).clamp(min=1).minimum(frames)
        return x, torch.arange(x.shape[1], device=x.device) < tokens[:, None]


class _Acoustic(nn.Module):
    """Learned queries that attend to the frames of several encoder layers, averaged per query."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        layers: int,
        heads: int,
        prompt_size: int,
        inner: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.queries = nn.ParameterList(
            nn.Parameter(torch.randn(1, prompt_size, in_dim)) for _ in range(layers)
        )
        self.layer_weights = nn.Parameter(torch.zeros(prompt_size, layers))
        self.blocks = nn.ModuleList(_Block(in_dim, heads, inner, dropout) for _ in range(2))
        self.norm = nn.LayerNorm(in_dim)
        self.project = nn.Linear(in_dim, out_dim)

    def forward(self, hidden: Sequence[Tensor]) -> Tensor:
        """Tokens [B P D] of the hidden states [B N E] of each layer."""
        outputs = []
        for bank, frames in zip(self.queries, hidden, strict=True):
            x = bank.expand(len(frames), -1, -1)
            for block in self.blocks:
                x = block(x, frames)
            outputs.append(x)
        x = torch.stack(outputs, 2)  # [B P K E]
        x = (x * self.layer_weights.softmax(-1)[..., None]).sum(2)  # [B P E]
        return self.project(self.norm(x))


class _Block(nn.Module):
    """BERT layer with cross-attention: post-norm, no mask, so queries attend to each other."""

    def __init__(self, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = _Attention(dim, heads, dropout)
        self.cross_attention = _Attention(dim, heads, dropout)
        self.up = nn.Linear(dim, inner)
        self.down = nn.Linear(inner, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        x = self.cross_attention(self.self_attention(x, x), frames)
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class _Attention(nn.Module):
    """Attention without a mask, with the residual and the norm after it."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(
                f"DualAudio: in_dim {dim} is not a multiple of heads={heads}; take the encoder's"
            )
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """[B P E] queries updated from the source [B N E]."""
        q, k, v = (
            rearrange(part, "b n (h e) -> b h n e", h=self.heads)
            for part in (self.q(x), self.k(source), self.v(source))
        )
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        y = self.out(rearrange(y, "b h n e -> b n (h e)"))
        return self.norm(x + self.dropout(y))
