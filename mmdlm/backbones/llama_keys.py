"""Tensor names of a LLaMA-like decoder in transformers, which most families use."""

from __future__ import annotations

from mmdlm.backbones.family import Keys

LAYER = "model.layers.{i}."

LLAMA_KEYS: Keys = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "out.weight": "lm_head.weight",
    **{
        f"blocks.{{i}}.attn.{ours}.{part}": theirs
        for part in ("weight", "bias")
        for ours, theirs in {
            "qkv": tuple(LAYER + f"self_attn.{name}_proj.{part}" for name in "qkv"),
            "o": LAYER + f"self_attn.o_proj.{part}",
        }.items()
    },
    "blocks.{i}.attn_norm.weight": LAYER + "input_layernorm.weight",
    "blocks.{i}.attn.q_norm.weight": LAYER + "self_attn.q_norm.weight",
    "blocks.{i}.attn.k_norm.weight": LAYER + "self_attn.k_norm.weight",
    "blocks.{i}.mlp_norm.weight": LAYER + "post_attention_layernorm.weight",
    "blocks.{i}.mlp.gate_up.weight": (
        LAYER + "mlp.gate_proj.weight",
        LAYER + "mlp.up_proj.weight",
    ),
    "blocks.{i}.mlp.down.weight": LAYER + "mlp.down_proj.weight",
}
"""Every tensor such a checkpoint may have; the spec determines which a model needs."""
