"""LLaDA-MoE-7B-A1B: LLaDA with experts, full attention, position i scores token i.

Source: inclusionAI on the hub: configuration_lladamoe.py, modeling_lladamoe.py (also ZHZisZZ/dllm:
dllm/pipelines/llada/models).
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.family import Family, Keys, Spec, architecture
from mmdlm.backbones.llama_config import Ids, read_config, write_config
from mmdlm.backbones.llama_keys import LAYER, LLAMA_KEYS
from mmdlm.backbones.moe import MoEConfig

# What configuration_lladamoe.py assumes of absent keys; its sizes, -1, only mean "required".
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
# <|mask|> and <|endoftext|> of the published tokenizer; the config leaves the former out.
IDS = Ids(mask=156895, eos=156892, pad=156892)

EXPERT_KEYS: Keys = {
    "blocks.{i}.moe.router.weight": LAYER + "mlp.gate.weight",
    "blocks.{i}.moe.experts.gate_up.weight": (
        LAYER + "mlp.experts.{e}.gate_proj.weight",
        LAYER + "mlp.experts.{e}.up_proj.weight",
    ),
    "blocks.{i}.moe.experts.down.weight": LAYER + "mlp.experts.{e}.down_proj.weight",
}
"""What LLaDA2 calls the same."""


class LLaDAMoE(Family):
    """OLMoE's layout; on the hub its model type is that of dense LLaDA."""

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
        """Whether it says so, or without an architecture has the keys no other family has."""
        named = architecture(config)
        own = config.keys() & {"expert_intermediate_size", "moe_layer_freq"}
        typed = config.get("model_type") in (None, "llada", "lladamoe", "llada_moe")
        return named == "LLaDAMoEModelLM" or (not named and typed and bool(own))

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; absent keys mean what configuration_lladamoe.py makes of them.

        Like the published code, it does not look at `norm_topk_prob`, `routed_scaling_factor`,
        `moe_router_score_function`, `router_num_group` and `router_topk_group`. A mask id that
        config.json lacks is the published one, or the last row of a smaller embedding.
        """
        c = DEFAULTS | config
        inside = config.get("rope_parameters") or {}
        _need({**inside, **config}, SIZES)
        layers, frequency = c["num_hidden_layers"], c["moe_layer_freq"]
        if not isinstance(frequency, list) or len(frequency) < layers:
            raise ValueError(
                f"LLaDAMoE: config.json has moe_layer_freq {frequency}, expected a list with 1 per "
                f"layer of experts and 0 per dense one, {layers} in all"
            )
        dense = tuple(i for i, flag in enumerate(frequency[:layers]) if flag == 0)
        switches = {
            "qk_norm": "head" if c["qk_layernorm"] else "none",
            "clip": c["clip_qkv"],
            "rotary": c.get("partial_rotary_factor", inside.get("partial_rotary_factor", 1.0)),
            "moe": None if len(dense) == layers else _experts(c, dense),
        }
        sizes = {"intermediate_size": c["dense_intermediate_size"] or 0}
        return read_config(cls, config | sizes, DEFAULTS, IDS, switches, template="llada_moe")

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
    """Raises unless config.json has sizes that nothing can stand in for."""
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ValueError(
            f"LLaDAMoE: config.json lacks {', '.join(missing)}, which have no default; take it "
            "from where the weights are"
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
