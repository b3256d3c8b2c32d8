"""LLaDA-MoE-7B-A1B: mixture of experts, full attention, position i scores token i.

Source: inclusionAI on the hub: configuration_lladamoe.py, modeling_lladamoe.py (also ZHZisZZ/dllm:
dllm/pipelines/llada/models).
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.family import Family, Keys, Spec, architecture, filled
from mmdlm.backbones.llama_config import Ids, read_config, write_config
from mmdlm.backbones.llama_keys import LAYER, LLAMA_KEYS
from mmdlm.backbones.moe import MoEConfig

# Defaults of absent keys in configuration_lladamoe.py; its sizes of -1 mean "required".
DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "clip_qkv": None,
    "dense_intermediate_size": None,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "moe_router_enable_expert_bias": None,
    "num_key_value_heads": None,
    "qk_layernorm": None,
    "rms_norm_eps": 1e-5,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
}
SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "moe_layer_freq",
    "rope_theta",
    "vocab_size",
)
EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "expert_intermediate_size")
# <|mask|> and <|endoftext|> of the published tokenizer; config.json lacks the former.
IDS = Ids(mask=156895, eos=156892, pad=156892)

EXPERT_KEYS: Keys = {
    "blocks.{i}.moe.router.weight": LAYER + "mlp.gate.weight",
    "blocks.{i}.moe.experts.gate_up.weight": (
        LAYER + "mlp.experts.{e}.gate_proj.weight",
        LAYER + "mlp.experts.{e}.up_proj.weight",
    ),
    "blocks.{i}.moe.experts.down.weight": LAYER + "mlp.experts.{e}.down_proj.weight",
}
"""Names shared with LLaDA2."""


class LLaDAMoE(Family):
    """OLMoE's layout; on the hub its `model_type` is that of dense LLaDA."""

    TYPES: ClassVar[tuple[str, ...]] = ("lladamoemodellm", "lladamoe", "llada_moe", "llada")
    KEYS: ClassVar[Keys] = {
        **LLAMA_KEYS,
        **EXPERT_KEYS,
        "blocks.{i}.moe.router.bias": LAYER + "mlp.expert_bias",
        "blocks.{i}.moe.shared.gate_up.weight": (
            LAYER + "shared_expert.gate_proj.weight",
            LAYER + "shared_expert.up_proj.weight",
        ),
        "blocks.{i}.moe.shared.down.weight": LAYER + "shared_expert.down_proj.weight",
    }
    FLOAT32: ClassVar[tuple[str, ...]] = ("moe.router.bias",)

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether `architectures` names it or, without it, its distinctive keys are present."""
        named = architecture(config)
        own = config.keys() & {"expert_intermediate_size", "moe_layer_freq"}
        typed = config.get("model_type") in (None, "llada", "lladamoe", "llada_moe")
        return named == "LLaDAMoEModelLM" or (not named and typed and bool(own))

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; absent keys have the defaults of configuration_lladamoe.py.

        Like the published code, it ignores `norm_topk_prob`, `routed_scaling_factor`,
        `moe_router_score_function`, `router_num_group` and `router_topk_group`. Without a mask id
        in config.json it is the published one, or unknown in a smaller vocabulary.
        """
        c = filled("LLaDAMoE", DEFAULTS, config)
        inside = config.get("rope_scaling") or config.get("rope_parameters") or {}
        _need({**inside, **config}, SIZES)
        layers, frequency = c["num_hidden_layers"], c["moe_layer_freq"]
        if not isinstance(frequency, list) or len(frequency) < layers:
            raise ValueError(
                f"LLaDAMoE: moe_layer_freq in config.json is {frequency}, expected {layers} "
                "values: 1 for experts, 0 for a dense layer"
            )
        dense = tuple(i for i, flag in enumerate(frequency[:layers]) if flag == 0)
        switches = {
            "qk_norm": "head" if c["qk_layernorm"] else "none",
            "clip": c["clip_qkv"],
            "moe": None if len(dense) == layers else _experts(c, dense),
        }
        sizes = {"intermediate_size": c["dense_intermediate_size"] or 0}
        return read_config(cls, config | sizes, DEFAULTS, IDS, switches, 1.0, template="llada_moe")

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec."""
        t, moe = spec.transformer, spec.transformer.moe
        config = write_config(
            cls,
            spec,
            DEFAULTS,
            IDS,
            architectures=["LLaDAMoEModelLM"],
            model_type="llada",
            clip_qkv=t.clip,
            dense_intermediate_size=t.inner,
            expert_intermediate_size=moe and moe.inner,
            moe_layer_freq=[int(t.is_sparse(i)) for i in range(t.layers)],
            moe_router_enable_expert_bias=bool(moe and moe.bias),
            moe_router_score_function="softmax",
            norm_topk_prob=None,
            num_experts=moe and moe.experts,
            num_experts_per_tok=moe and moe.top,
            partial_rotary_factor=t.rotary,
            qk_layernorm=t.qk_norm == "head",
            routed_scaling_factor=1,
            shared_expert_intermediate_size=(moe and moe.shared) or None,
        )
        del config["intermediate_size"]
        return config


def _need(config: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Checks that config.json has the sizes without a default."""
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ValueError(
            f"LLaDAMoE: config.json lacks {', '.join(missing)}, which have no default; take it "
            "from the source of the weights"
        )


def _experts(config: dict[str, Any], dense: tuple[int, ...]) -> MoEConfig:
    """The experts of a config with its defaults filled in."""
    _need(config, EXPERT_SIZES)
    return MoEConfig(
        experts=config["num_experts"],
        top=config["num_experts_per_tok"],
        inner=config["expert_intermediate_size"],
        dense=dense,
        shared=config["shared_expert_intermediate_size"] or 0,
        score="softmax",
        bias=bool(config["moe_router_enable_expert_bias"]),
        bias_weighs=True,
    )
