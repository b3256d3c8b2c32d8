"""What families differ by: sizes and switches of the one transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmdlm.backbones.moe import MoEConfig


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of a backbone.

    Args:
        width: D.
        layers: number of blocks.
        heads: query heads.
        kv_heads: key/value heads; `heads` must be a multiple of it. None: as many as heads.
        head_dim: width of one head. None: width / heads.
        inner: width inside the MLP.
        vocab: rows V of the embedding and of the head; 0 only until a tokenizer is known.
        eps: added to the mean square in RMSNorm.
        theta: rotary base.
        theta_scale: factor on the base for contexts beyond the trained ones (LongLLaDA, NTK).
        rotary: fraction of each head that is rotated.
        rotary_float32: rotate in float32 (LLaDA) instead of in the activations' type (Qwen-like).
        qkv_bias: biases on queries, keys and values.
        o_bias: a bias on the attention's output.
        bias: biases on every other linear layer, head included.
        norm_bias: biases on the norms.
        qk_norm: no norm of queries and keys, one per head, or one over all heads together.
        clip: bound on the size of queries, keys and values, before they are rotated; None for none.
        tied: the head is the embedding.
        embed_scale: factor on the embeddings.
        logit_scale: factor on the logits.
        moe: experts instead of the MLP; None for a dense model.
    """

    width: int
    layers: int
    heads: int
    inner: int
    vocab: int = 0
    kv_heads: int | None = None
    head_dim: int | None = None
    eps: float = 1e-6
    theta: float = 10_000.0
    theta_scale: float = 1.0
    rotary: float = 1.0
    rotary_float32: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    bias: bool = False
    norm_bias: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    clip: float | None = None
    tied: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        if self.heads % self.keys_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.keys_heads} key heads")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of {self.heads} heads")
        if self.inner < 1 and not all(map(self.is_sparse, range(self.layers))):
            raise ValueError(f"inner is {self.inner}, expected the width inside the MLP")

    @property
    def keys_heads(self) -> int:
        """Key/value heads in use."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """Width of one head in use."""
        return self.head_dim or self.width // self.heads

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.moe is not None and layer not in self.moe.dense
