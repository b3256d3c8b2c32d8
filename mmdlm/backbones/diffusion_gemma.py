"""DiffusionGemma's language model: Gemma 4 that denoises canvases of random tokens.

Checkpoint: google/diffusiongemma-26B-A4B-it.

Source: huggingface/transformers: models/diffusion_gemma (configuration, modeling, generation).
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.config import GemmaConfig, TransformerConfig
from mmdlm.backbones.family import Family, Keys, Spec, architecture, end_ids, filled, require

# Defaults of the configuration class.
TEXT: dict[str, Any] = {
    "attention_bias": False,
    "eos_token_id": 1,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_hidden_layers": 30,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "vocab_size": 262144,
}
SOFTCAP = 30.0
CANVAS = 256
SLIDING, FULL = "sliding_attention", "full_attention"
ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
NORMS = {
    "attn_norm": "input_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_attn_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm_1",
    "moe_norm": "pre_feedforward_layernorm_2",
    "post_moe_norm": "post_feedforward_layernorm_2",
    "post_norm": "post_feedforward_layernorm",
    **{each: f"self_attn.{each}_proj" for each in ("q", "k", "v", "o")},
    **{f"mlp.{each}": f"mlp.{each}_proj" for each in ("gate", "up", "down")},
    "moe.router": "router.proj",
}
"""Our modules with one weight and their published names."""
LAYER, DECODER = "model.decoder.layers.{i}.", "model.decoder.self_conditioning."


class DiffusionGemma(Family):
    """Reads the text model; images are those of the system of the same name."""

    TYPES: ClassVar[tuple[str, ...]] = ("diffusiongemmaforblockdiffusion", "diffusion_gemma")
    KEYS: ClassVar[Keys] = {
        "embed.weight": "model.decoder.embed_tokens.weight",
        **{f"blocks.{{i}}.{o}.weight": f"{LAYER}{p}.weight" for o, p in NORMS.items()},
        "blocks.{i}.moe.scale": f"{LAYER}router.scale",
        "blocks.{i}.moe.expert_scale": f"{LAYER}router.per_expert_scale",
        "blocks.{i}.moe.gate_up": f"{LAYER}experts.gate_up_proj",
        "blocks.{i}.moe.down": f"{LAYER}experts.down_proj",
        "blocks.{i}.decoder_scale": f"{LAYER}layer_scalar",
        "blocks.{i}.encoder_scale": "model.encoder.language_model.layers.{i}.layer_scalar",
        "norm.weight": "model.decoder.norm.weight",
        "conditioning.norm.weight": f"{DECODER}pre_norm.weight",
        **{
            f"conditioning.mlp.{each}.weight": f"{DECODER}{each}_proj.weight"
            for each in ("gate", "up", "down")
        },
        "model.encoder.vision_tower.*": None,
        "model.encoder.embed_vision.*": None,
    }

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether `architectures` or `model_type` names it."""
        named = architecture(config) == "DiffusionGemmaForBlockDiffusion"
        return named or config.get("model_type") == "diffusion_gemma"

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; absent keys have the defaults of the configuration class.

        Raises:
            ValueError: a setting is not supported.
        """
        c = filled("DiffusionGemma", TEXT, config.get("text_config") or {})
        require("DiffusionGemma", c, {"hidden_activation": ("gelu_pytorch_tanh",)})
        require("DiffusionGemma", c, {"attention_bias": (False,)})
        both = {"use_bidirectional_attention": c.get("use_bidirectional_attention")}
        require("DiffusionGemma", both, {"use_bidirectional_attention": ("vision",)})
        ropes = {**ROPE, **(c.get("rope_parameters") or {})}
        kinds = {kind: {"rope_type": ropes[kind].get("rope_type")} for kind in ROPE}
        for kind, given in kinds.items():
            require("DiffusionGemma", given, {"rope_type": (ROPE[kind]["rope_type"],)})
        layers, vocab = c["num_hidden_layers"], c["vocab_size"]
        full = _full_layers(c)
        inside = (c.get("per_layer_config") or {}).get(str(full[0])) or {}
        end, stops = end_ids(config.get("eos_token_id") or c["eos_token_id"])
        return Spec(
            family="diffusion_gemma",
            transformer=TransformerConfig(
                width=c["hidden_size"],
                layers=layers,
                heads=c["num_attention_heads"],
                kv_heads=c["num_key_value_heads"],
                head_dim=c["head_dim"],
                inner=c["intermediate_size"],
                vocab=vocab,
                eps=c["rms_norm_eps"],
                theta=ropes[SLIDING]["rope_theta"],
                tied=True,
                gemma=GemmaConfig(
                    full=full,
                    window=c["sliding_window"],
                    full_head_dim=inside.get("head_dim") or c["global_head_dim"],
                    full_kv_heads=inside.get("num_key_value_heads")
                    or c.get("num_global_key_value_heads")
                    or c["num_key_value_heads"],
                    full_theta=ropes[FULL]["rope_theta"],
                    full_rotary=ropes[FULL].get("partial_rotary_factor", 1.0),
                    softcap=c.get("final_logit_softcapping") or SOFTCAP,
                    experts=c.get("num_experts"),
                    top=c.get("top_k_experts"),
                    expert_inner=c.get("moe_intermediate_size"),
                ),
            ),
            mask_id=vocab,
            eos_id=end,
            pad_id=config.get("pad_token_id") or c["pad_token_id"] or 0,
            stop_ids=stops,
            attention="canvas",
            block_size=config.get("canvas_length") or CANVAS,
            noise="uniform",
            context=c["max_position_embeddings"],
        )

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec."""
        t, g = spec.transformer, spec.transformer.gemma
        kinds = [FULL if i in g.full else SLIDING for i in range(t.layers)]
        inside = {"head_dim": g.full_head_dim, "num_key_value_heads": g.full_kv_heads}
        text = {
            "model_type": "diffusion_gemma_text",
            "attention_bias": False,
            "eos_token_id": [spec.eos_id, *spec.stop_ids] if spec.stop_ids else spec.eos_id,
            "final_logit_softcapping": g.softcap,
            "head_dim": t.head_width,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": t.width,
            "intermediate_size": t.inner,
            "layer_types": kinds,
            "max_position_embeddings": spec.context,
            "moe_intermediate_size": g.expert_inner,
            "num_attention_heads": t.heads,
            "num_experts": g.experts,
            "num_hidden_layers": t.layers,
            "num_key_value_heads": t.keys_heads,
            "pad_token_id": spec.pad_id,
            "per_layer_config": {str(i): inside for i in g.full},
            "rms_norm_eps": t.eps,
            "rope_parameters": {
                SLIDING: ROPE[SLIDING] | {"rope_theta": t.theta},
                FULL: ROPE[FULL]
                | {"rope_theta": g.full_theta, "partial_rotary_factor": g.full_rotary},
            },
            "sliding_window": g.window,
            "tie_word_embeddings": True,
            "top_k_experts": g.top,
            "use_bidirectional_attention": "vision",
            "vocab_size": t.vocab,
        }
        return {
            "architectures": ["DiffusionGemmaForBlockDiffusion"],
            "model_type": "diffusion_gemma",
            "canvas_length": spec.block_size,
            "text_config": text,
            "tie_word_embeddings": True,
        }


def _full_layers(config: dict[str, Any]) -> tuple[int, ...]:
    """Numbers of the layers with full attention; the last one always is."""
    layers = config["num_hidden_layers"]
    usual = [SLIDING if (i + 1) % 6 else FULL for i in range(layers)]
    kinds = config.get("layer_types") or usual
    if len(kinds) != layers or not {*kinds} <= {FULL, SLIDING}:
        raise ValueError(
            f"DiffusionGemma: layer_types is {kinds}, expected {FULL} or {SLIDING} for each of the "
            f"{layers} layers"
        )
    return tuple(i for i, kind in enumerate(kinds) if kind == FULL or i == layers - 1)
