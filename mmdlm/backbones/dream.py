"""Dream-v0-7B, Dream-Coder and DiffuCoder: Qwen2.5 run bidirectionally, logits one ahead.

Source: Dream-org on the hub: configuration_dream.py, modeling_dream.py (also NVlabs/Fast-dLLM:
dream/model, HKUNLP/Dream).
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.family import (
    Family,
    Keys,
    Spec,
    architecture,
    end_ids,
    expressible,
    require,
    rotary_base,
)
from mmdlm.backbones.transformer import TransformerConfig

# What configuration_dream.py assumes of absent keys; other sizes than Dream-7B has.
DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "mask_token_id": 151666,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
ROPE_THETA = 10_000.0
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}
# <|endoftext|> and <|im_end|> of the published tokenizer; Instruct closes a turn with the latter.
END_OF_TEXT, END_OF_TURN = 151643, 151645

_LAYER = "model.layers.{i}."


class Dream(Family):
    """The Qwen2 layout, `model.layers`, with biases on queries, keys and values."""

    KEYS: ClassVar[Keys] = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "out.weight": "lm_head.weight",
        "blocks.{i}.attn_norm.weight": _LAYER + "input_layernorm.weight",
        "blocks.{i}.attn.qkv.weight": (
            _LAYER + "self_attn.q_proj.weight",
            _LAYER + "self_attn.k_proj.weight",
            _LAYER + "self_attn.v_proj.weight",
        ),
        "blocks.{i}.attn.qkv.bias": (
            _LAYER + "self_attn.q_proj.bias",
            _LAYER + "self_attn.k_proj.bias",
            _LAYER + "self_attn.v_proj.bias",
        ),
        "blocks.{i}.attn.o.weight": _LAYER + "self_attn.o_proj.weight",
        "blocks.{i}.mlp_norm.weight": _LAYER + "post_attention_layernorm.weight",
        "blocks.{i}.mlp.gate_up.weight": (
            _LAYER + "mlp.gate_proj.weight",
            _LAYER + "mlp.up_proj.weight",
        ),
        "blocks.{i}.mlp.down.weight": _LAYER + "mlp.down_proj.weight",
    }

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether it is Dream of 2025; later "Dream" checkpoints are Qwen3 with blocks."""
        named = architecture(config)
        typed = str(config.get("model_type", "")).lower() == "dream"
        if named and named not in ("DreamModel", "DreamForCausalLM"):
            return False
        if not (named or typed):
            return False
        later = any(name.endswith("self_attn.q_norm.weight") for name in names)
        return not later and "block_size" not in config

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; absent keys mean what configuration_dream.py makes of them."""
        c = DEFAULTS | config
        require("Dream", c, SUPPORTED)
        vocab, pad = c["vocab_size"], c["pad_token_id"]
        # The class has no default of its own here; the published tokenizers pad with their end.
        eos, stops = end_ids(c.get("eos_token_id", pad))
        if eos == END_OF_TEXT and vocab > END_OF_TURN:
            stops = tuple(dict.fromkeys((*stops, END_OF_TURN)))
        kv_heads = c["num_key_value_heads"]
        transformer = TransformerConfig(
            vocab=vocab,
            width=c["hidden_size"],
            layers=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            kv_heads=c["num_attention_heads"] if kv_heads is None else kv_heads,
            head_dim=c.get("head_dim"),
            inner=c["intermediate_size"],
            eps=c["rms_norm_eps"],
            theta=rotary_base(config, ROPE_THETA),
            qkv_bias=True,
            tied=c["tie_word_embeddings"],
        )
        return Spec(
            family="dream",
            transformer=transformer,
            mask_id=c["mask_token_id"],
            eos_id=eos,
            pad_id=pad,
            stop_ids=stops,
            shift=True,
            template="chatml",
        )

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec."""
        t = spec.transformer
        expressible(
            "Dream",
            {
                "rotary": (t.rotary, 1.0),
                "rotary_float32": (t.rotary_float32, False),
                "qkv_bias": (t.qkv_bias, True),
                "bias": (t.bias, False),
                "norm_bias": (t.norm_bias, False),
                "qk_norm": (t.qk_norm, "none"),
                "embed_scale": (t.embed_scale, 1.0),
                "logit_scale": (t.logit_scale, 1.0),
                "shift": (spec.shift, True),
                "attention": (spec.attention, "full"),
            },
        )
        stops = [i for i in spec.stop_ids if i != END_OF_TURN]
        return DEFAULTS | {
            "architectures": ["DreamModel"],
            "model_type": "Dream",
            "eos_token_id": [spec.eos_id, *stops] if stops else spec.eos_id,
            "hidden_size": t.width,
            "intermediate_size": t.inner,
            "mask_token_id": spec.mask_id,
            "num_attention_heads": t.heads,
            "num_hidden_layers": t.layers,
            "num_key_value_heads": t.keys_heads,
            "pad_token_id": spec.pad_id,
            "rms_norm_eps": t.eps,
            "rope_theta": t.theta * t.theta_scale,
            "tie_word_embeddings": t.tied,
            "vocab_size": t.vocab,
            **({} if t.head_dim is None else {"head_dim": t.head_dim}),
        }
