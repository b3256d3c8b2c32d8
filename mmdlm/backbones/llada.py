"""LLaDA-8B-Base, LLaDA-8B-Instruct and LLaDA-1.5: full attention, position i scores token i.

Source: ML-GSAI/LLaDA on the hub: configuration_llada.py, modeling_llada.py (also
NVlabs/Fast-dLLM: llada/model).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import (
    Family,
    Keys,
    Spec,
    architecture,
    end_ids,
    expressible,
    filled,
    require,
    special,
)
from mmdlm.backbones.rotary import read_rope

# Defaults of absent keys in configuration_llada.py: an older architecture, not LLaDA-8B.
DEFAULTS: dict[str, Any] = {
    "activation_type": "swiglu",
    "alibi": False,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": None,
    "block_group_size": 1,
    "block_type": "sequential",
    "d_model": 768,
    "embedding_size": 50304,
    "eos_token_id": 50256,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "default",
    "layer_norm_with_affine": True,
    "mask_token_id": 50256,
    "max_sequence_length": 1024,
    "mlp_hidden_size": None,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 12,
    "n_kv_heads": None,
    "n_layers": 12,
    "pad_token_id": 50256,
    "rms_norm_eps": 1e-5,
    "rope": False,
    "rope_full_precision": True,
    "scale_logits": False,
    "vocab_size": 50257,
    "weight_tying": True,
}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    "alibi": (False,),
    "block_group_size": (1,),
    "layer_norm_with_affine": (True,),
}
# <|endoftext|> and <|eot_id|> of the published tokenizer; Instruct ends a turn with the latter.
END_OF_TEXT, END_OF_TURN = 126081, 126348
MASK = 126336  # <|mdm_mask|>


class LLaDA(Family):
    """The original layout, `model.transformer.blocks`."""

    TYPES: ClassVar[tuple[str, ...]] = ("lladamodellm", "llada")
    KEYS: ClassVar[Keys] = {
        "embed.weight": "model.transformer.wte.weight",
        "norm.weight": "model.transformer.ln_f.weight",
        "norm.bias": "model.transformer.ln_f.bias",
        **{
            f"{ours}.{part}": theirs
            for part in ("weight", "bias")
            for ours, theirs in {
                "out": f"model.transformer.ff_out.{part}",
                "blocks.{i}.attn_norm": f"model.transformer.blocks.{{i}}.attn_norm.{part}",
                "blocks.{i}.attn.qkv": (
                    f"model.transformer.blocks.{{i}}.q_proj.{part}",
                    f"model.transformer.blocks.{{i}}.k_proj.{part}",
                    f"model.transformer.blocks.{{i}}.v_proj.{part}",
                ),
                "blocks.{i}.attn.q_norm": f"model.transformer.blocks.{{i}}.q_norm.{part}",
                "blocks.{i}.attn.k_norm": f"model.transformer.blocks.{{i}}.k_norm.{part}",
                "blocks.{i}.attn.o": f"model.transformer.blocks.{{i}}.attn_out.{part}",
                "blocks.{i}.mlp_norm": f"model.transformer.blocks.{{i}}.ff_norm.{part}",
                # ff_proj is the gate.
                "blocks.{i}.mlp.gate_up": (
                    f"model.transformer.blocks.{{i}}.ff_proj.{part}",
                    f"model.transformer.blocks.{{i}}.up_proj.{part}",
                ),
                "blocks.{i}.mlp.down": f"model.transformer.blocks.{{i}}.ff_out.{part}",
            }.items()
        },
    }

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether it is LLaDA in the original layout; LLaDA-V uses the same architecture name."""
        named = architecture(config) or {"llada": "LLaDAModelLM"}.get(config.get("model_type", ""))
        layout = any(name.endswith("transformer.wte.weight") for name in names)
        if not named:
            return layout and "d_model" in config
        return named == "LLaDAModelLM" and (layout or "hidden_size" not in config)

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; absent keys have the defaults of configuration_llada.py."""
        c = filled("LLaDA", DEFAULTS, config)
        require("LLaDA", c, SUPPORTED)
        if c["attention_layer_norm"]:
            require("LLaDA", c, {"attention_layer_norm_with_affine": (True,)})
        width, norm_bias = c["d_model"], c["bias_for_layer_norm"]
        vocab = c["embedding_size"] or c["vocab_size"]
        eos, stops = end_ids(c["eos_token_id"])
        stops = tuple(dict.fromkeys((*stops, *_implied(eos, vocab))))
        transformer = TransformerConfig(
            vocab=vocab,
            width=width,
            layers=c["n_layers"],
            heads=c["n_heads"],
            kv_heads=_kv_heads(c),
            inner=c["mlp_hidden_size"] or int(c["mlp_ratio"] * width),
            eps=c["rms_norm_eps"],
            theta=_theta(config),
            rotary_float32=c["rope_full_precision"],
            qkv_bias=bool(c["include_qkv_bias"] or c["include_bias"]),
            bias=c["include_bias"],
            norm_bias=c["include_bias"] if norm_bias is None else norm_bias,
            qk_norm="whole" if c["attention_layer_norm"] else "none",
            tied=c["weight_tying"],
            embed_scale=math.sqrt(width) if c["input_emb_norm"] else 1.0,
            logit_scale=1 / math.sqrt(width) if c["scale_logits"] else 1.0,
        )
        return Spec(
            family="llada",
            transformer=transformer,
            mask_id=c["mask_token_id"],
            eos_id=eos,
            pad_id=eos if c["pad_token_id"] is None else c["pad_token_id"],
            stop_ids=stops,
            template="llada",
            context=c["max_sequence_length"],
        )

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec."""
        t = spec.transformer
        root = math.sqrt(t.width)
        expressible(
            "LLaDA",
            {
                "rotary": (t.rotary, 1.0),
                "rope": (t.rope, None),
                "qk_norm": (t.qk_norm == "head", False),
                "head_dim": (t.head_width * t.heads, t.width),
                "embed_scale": (t.embed_scale in (1.0, root), True),
                "logit_scale": (t.logit_scale in (1.0, 1 / root), True),
                "shift": (spec.shift, False),
                "attention": (spec.attention, "full"),
            },
        )
        implied = _implied(spec.eos_id, t.vocab)
        stops = [i for i in spec.stop_ids if i not in implied]
        return DEFAULTS | {
            "architectures": ["LLaDAModelLM"],
            "model_type": "llada",
            **{key: allowed[0] for key, allowed in SUPPORTED.items()},
            "attention_layer_norm": t.qk_norm == "whole",
            "bias_for_layer_norm": t.norm_bias,
            "d_model": t.width,
            "embedding_size": t.vocab,
            "eos_token_id": [spec.eos_id, *stops] if stops else spec.eos_id,
            "include_bias": t.bias,
            "include_qkv_bias": t.qkv_bias,
            "input_emb_norm": t.embed_scale != 1.0,
            "mask_token_id": spec.mask_id,
            "max_sequence_length": spec.reach,
            "mlp_hidden_size": t.inner,
            "n_heads": t.heads,
            "n_kv_heads": t.keys_heads,
            "n_layers": t.layers,
            "pad_token_id": spec.pad_id,
            "rms_norm_eps": t.eps,
            "rope_full_precision": t.rotary_float32,
            "rope_theta": t.theta * t.theta_scale,
            "scale_logits": t.logit_scale != 1.0,
            "vocab_size": t.vocab,
            "weight_tying": t.tied,
        }


def published_ids(config: dict[str, Any], vocab: int) -> dict[str, Any]:
    """Special ids of a config.json, absent ones as in the published tokenizer.

    Args:
        config: config.json of a descendant of LLaDA-8B.
        vocab: rows of the embedding.
    """
    eos = special(config, "eos_token_id", END_OF_TEXT, vocab)
    pad = special(config, "pad_token_id", END_OF_TEXT, vocab)
    return {
        "mask_token_id": special(config, "mask_token_id", MASK, vocab),
        "eos_token_id": eos,
        "pad_token_id": end_ids(eos)[0] if pad is None else pad,
    }


def _implied(eos: int | None, vocab: int) -> tuple[int, ...]:
    """The other end of the published tokenizer, which config.json need not list."""
    other = {END_OF_TEXT: END_OF_TURN, END_OF_TURN: END_OF_TEXT}.get(eos)
    return () if other is None or other >= vocab else (other,)


def _theta(config: dict[str, Any]) -> float:
    """The rotary base; the published code has no scaling of it."""
    rope = read_rope(config)
    if rope["rope"] is not None:
        raise ValueError(
            f"LLaDA: config.json has rotary scaling {rope['rope'].rope_type!r}, which is not in "
            "the published code; remove it, or give load(theta_scale=...) for longer contexts"
        )
    return rope["theta"]


def _kv_heads(config: dict[str, Any]) -> int:
    """Key/value heads of a config with its defaults filled in."""
    heads, single = config["n_kv_heads"], config["multi_query_attention"]
    if single and heads not in (None, 1):
        raise ValueError(
            f"LLaDA: config.json has multi_query_attention with n_kv_heads {heads}, expected 1 or "
            "null; keep one of the two"
        )
    if single:
        return 1
    return config["n_heads"] if heads is None else heads
