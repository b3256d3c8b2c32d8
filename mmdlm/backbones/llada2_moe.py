"""LLaDA2.0, 2.1 and their CAP variants: group-limited experts, block-causal attention.

Source: inclusionAI on the hub: configuration_llada2_moe.py, modeling_llada2_moe.py (also
ZHZisZZ/dllm: dllm/pipelines/llada2/models, dllm/pipelines/llada21/models).
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.config import LAYERS
from mmdlm.backbones.family import Family, Keys, Spec, architecture, filled, require
from mmdlm.backbones.llada_moe import EXPERT_KEYS
from mmdlm.backbones.llama_config import Ids, read_config, write_config
from mmdlm.backbones.llama_keys import LAYER, LLAMA_KEYS
from mmdlm.backbones.moe import MoEConfig

# Defaults of absent keys in configuration_llada2_moe.py; not the published values.
DEFAULTS: dict[str, Any] = {
    "first_k_dense_replace": 0,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": None,
    "max_position_embeddings": 16384,
    "moe_intermediate_size": None,
    "n_group": 8,
    "num_attention_heads": 16,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 24,
    "num_key_value_heads": 0,
    "num_shared_experts": 0,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "use_bias": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_sliding_window": False,
    "vocab_size": 30592,
}
ROTARY = 0.5
# The published router is a sigmoid regardless of config.json.
SUPPORTED: dict[str, tuple[Any, ...]] = {"score_function": ("sigmoid", None)}
BLOCK_SIZE = 32
# <|mask|> and <|endoftext|>, defaults of the published `generate`; config.json lacks the former.
IDS = Ids(mask=156895, eos=156892, pad=156892)


class LLaDA2MoE(Family):
    """Bailing-MoE's layout: fused queries, keys and values, shared expert, first layers dense."""

    TYPES: ClassVar[tuple[str, ...]] = ("llada2moemodellm", "llada2_moe", "llada21_moe")
    KEYS: ClassVar[Keys] = {
        **LLAMA_KEYS,
        **EXPERT_KEYS,
        "embed.weight": "model.word_embeddings.weight",
        **{
            f"blocks.{{i}}.attn.{ours}": f"{LAYER}attention.{theirs}"
            for ours, theirs in {
                "qkv.weight": "query_key_value.weight",
                "qkv.bias": "query_key_value.bias",
                "q_norm.weight": "query_layernorm.weight",
                "k_norm.weight": "key_layernorm.weight",
                "o.weight": "dense.weight",
                "o.bias": "dense.bias",
            }.items()
        },
        "blocks.{i}.moe.router.bias": LAYER + "mlp.gate.expert_bias",
        "blocks.{i}.moe.shared.gate_up.weight": (
            LAYER + "mlp.shared_experts.gate_proj.weight",
            LAYER + "mlp.shared_experts.up_proj.weight",
        ),
        "blocks.{i}.moe.shared.down.weight": LAYER + "mlp.shared_experts.down_proj.weight",
    }
    FLOAT32: ClassVar[tuple[str, ...]] = ("moe.router.bias",)

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether `architectures` or `model_type` names it or, without both, by its tensors."""
        named = architecture(config) or config.get("model_type")
        if named:
            return named in ("LLaDA2MoeModelLM", "llada2_moe", "llada21_moe")
        fused = any(name.endswith(".attention.query_key_value.weight") for name in names)
        return fused and "moe_intermediate_size" in config

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; absent keys have the defaults of configuration_llada2_moe.py.

        Like the published code, it ignores `norm_topk_prob`: weights are normalized if a token is
        routed to more than one expert. Without a mask id in config.json it is the published one,
        or unknown in a smaller vocabulary.
        """
        c = filled("LLaDA2MoE", DEFAULTS, config)
        require("LLaDA2MoE", c, SUPPORTED)
        switches = {
            "qkv_bias": bool(c["use_qkv_bias"]),
            "o_bias": bool(c["use_bias"]),
            "qk_norm": "head" if c["use_qk_norm"] else "none",
            "moe": _experts(c, names),
        }
        sizes = {
            "num_key_value_heads": c["num_key_value_heads"] or c["num_attention_heads"],
            "intermediate_size": c["intermediate_size"] or 0,
        }
        return read_config(
            cls,
            config | sizes,
            DEFAULTS,
            IDS,
            switches,
            ROTARY,
            attention="block_causal",
            block_size=c.get("block_size") or c.get("block_length") or BLOCK_SIZE,
            template="llada_moe",
        )

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec."""
        t, moe = spec.transformer, spec.transformer.moe
        experts: dict[str, Any] = {"num_experts": None}
        if moe is not None:
            experts = {
                "first_k_dense_replace": len(moe.dense),
                "moe_intermediate_size": moe.inner,
                "moe_router_enable_expert_bias": moe.bias,
                "n_group": moe.groups,
                "num_experts": moe.experts,
                "num_experts_per_tok": moe.top,
                "num_shared_experts": moe.shared // moe.inner or None,
                "routed_scaling_factor": moe.scale,
                "topk_group": moe.top_groups,
            }
        return write_config(
            cls,
            spec,
            DEFAULTS,
            IDS,
            architectures=["LLaDA2MoeModelLM"],
            model_type="llada2_moe",
            block_size=spec.block_size,
            norm_topk_prob=True,
            partial_rotary_factor=t.rotary,
            score_function="sigmoid",
            use_bias=t.o_bias,
            use_qk_norm=t.qk_norm == "head",
            use_qkv_bias=t.qkv_bias,
            **experts,
        )


def _experts(config: dict[str, Any], names: set[str]) -> MoEConfig | None:
    """Experts of a config with its defaults filled in; None if every layer is dense."""
    dense = config["first_k_dense_replace"]
    if config["num_experts"] is None or dense >= config["num_hidden_layers"]:
        return None
    inner, top = config["moe_intermediate_size"], config["num_experts_per_tok"]
    if inner is None:
        raise ValueError(
            "LLaDA2MoE: config.json lacks moe_intermediate_size, the width of an expert, which has "
            "no default; take it from the source of the weights"
        )
    # The published router always has a bias; it is absent only if config and tensors agree.
    is_enabled = config.get("moe_router_enable_expert_bias") is not False
    return MoEConfig(
        experts=config["num_experts"],
        top=top,
        inner=inner,
        dense=tuple(range(min(dense, LAYERS))),
        shared=inner * (config["num_shared_experts"] or 0),
        score="sigmoid",
        bias=is_enabled or any(name.endswith("mlp.gate.expert_bias") for name in names),
        normalize=top > 1,
        scale=config["routed_scaling_factor"],
        groups=config["n_group"],
        top_groups=config["topk_group"],
    )
