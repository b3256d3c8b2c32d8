"""Sizes and switches of the transformer, by which the families differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from encoders.checks import Above, AtLeast, AtMost, Checked, Count, CountOrZero, Factor
from mmdlm.backbones.moe import MoEConfig
from mmdlm.backbones.rotary import RopeScaling

LAYERS = 10_000
"""Maximum number of layers, far above any published model."""


@dataclass(frozen=True)
class GemmaConfig(Checked):
    """What the blocks of `mmdlm.backbones.gemma` have beyond the other switches.

    Args:
        full: numbers of the layers with full attention; the others have a window.
        window: tokens that a token of the other layers attends to.
        full_head_dim: width of a head in the layers with full attention.
        full_kv_heads: key heads there, whose values are the same projection.
        full_theta: rotary base there.
        full_rotary: share of the rotary frequencies there that are not zero.
        softcap: bound on the absolute values of the logits.
        experts: E, experts per layer.
        top: K, experts per token (top-k).
        expert_inner: width inside one expert.
    """

    full: tuple[CountOrZero, ...]
    window: Count
    full_head_dim: Count
    full_kv_heads: Count
    full_theta: Annotated[float, AtLeast(1), AtMost(1e15)]
    full_rotary: Annotated[float, Above(0), AtMost(1)]
    softcap: Factor
    experts: Count
    top: Count
    expert_inner: Count


@dataclass(frozen=True)
class TransformerConfig(Checked):
    """Sizes and switches of a backbone.

    Args:
        width: D.
        layers: number of blocks.
        heads: query heads.
        kv_heads: key/value heads; `heads` must be a multiple of it. None: equal to heads.
        head_dim: width of one head. None: width / heads.
        inner: width inside the MLP.
        vocab: V, rows of the embedding and of the head; 0 until a tokenizer is known.
        eps: added to the mean square in RMSNorm.
        theta: rotary base.
        theta_scale: factor on the base for longer contexts than trained (LongLLaDA, NTK).
        rotary: fraction of each head that is rotated.
        rope: scaling of the rotary frequencies in config.json; None for none.
        rotary_float32: rotate in float32 (LLaDA) instead of in the activations' dtype (Qwen).
        qkv_bias: biases on queries, keys and values.
        o_bias: a bias on the attention's output.
        bias: biases on all linear layers, including the head.
        norm_bias: biases on the norms.
        qk_norm: norm of queries and keys: none, per head, or over all heads together.
        clip: bound on the absolute values of queries, keys and values before the rotation.
        tied: the head is the embedding.
        embed_scale: factor on the embeddings.
        logit_scale: factor on the logits.
        moe: mixture of experts instead of the MLP; None for a dense model.
        gemma: settings of Gemma's blocks; None for the usual ones.
    """

    width: Count
    layers: Annotated[int, AtLeast(1), AtMost(LAYERS)]
    heads: Count
    inner: CountOrZero
    vocab: CountOrZero = 0
    kv_heads: Count | None = None
    head_dim: Count | None = None
    eps: Annotated[float, AtLeast(1e-20), AtMost(1)] = 1e-6
    theta: Annotated[float, AtLeast(1), AtMost(1e15)] = 10_000.0
    theta_scale: Factor = 1.0
    rotary: Annotated[float, Above(0), AtMost(1)] = 1.0
    rope: RopeScaling | None = None
    rotary_float32: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    bias: bool = False
    norm_bias: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    clip: Factor | None = None
    tied: bool = False
    embed_scale: Factor = 1.0
    logit_scale: Factor = 1.0
    moe: MoEConfig | None = None
    gemma: GemmaConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.keys_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.keys_heads} key heads")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        turned = (int(self.head_width * self.rotary) + 1) // 2 * 2
        if not 2 <= turned <= self.head_width:
            raise ValueError(f"a head of width {self.head_width} cannot rotate {turned} channels")
        if not self.inner and not all(map(self.is_sparse, range(self.layers))):
            raise ValueError("TransformerConfig.inner is 0, expected at least 1 for an MLP layer")
        if self.rope is not None:
            self._check_rope(self.rope)

    @property
    def keys_heads(self) -> int:
        """Number of key/value heads."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.width // self.heads

    @property
    def rotary_width(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_width * self.rotary)

    def _check_rope(self, rope: RopeScaling) -> None:
        """Raises unless the scaling fits the other sizes."""
        base, width = self.theta * self.theta_scale, self.rotary_width
        if base <= 1 or width < 4:
            raise ValueError(
                f"rotary scaling {rope.rope_type!r} with base {base} and {width} rotated channels, "
                "expected a base above 1 and at least 4 channels"
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(rope, name)
            if factors is not None and len(factors) != width // 2:
                raise ValueError(f"{name} has {len(factors)} numbers, expected {width // 2}")
        if rope.constant_up_to is not None and self.theta_scale != 1:
            raise ValueError(
                f"theta_scale is {self.theta_scale}, expected 1 with rotary scaling "
                f"{rope.rope_type!r}, whose frequencies depend on the length"
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense
