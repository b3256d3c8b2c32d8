"""Conversion between config.json of a LLaMA-like decoder in transformers and `Spec`.

Most families use these keys. They differ in the defaults of absent keys, the special ids and a few
conventions, which the family files define.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import (
    Family,
    Spec,
    end_ids,
    expressible,
    filled,
    require,
    special,
)
from mmdlm.backbones.rotary import read_rope

# Defaults of absent keys, by the configuration class in transformers that a family derives from.
QWEN2: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3: dict[str, Any] = QWEN2 | {"attention_bias": False, "head_dim": 128}
LLAMA: dict[str, Any] = QWEN2 | {
    "attention_bias": False,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "num_key_value_heads": None,
    "vocab_size": 32000,
}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}


@dataclass(frozen=True)
class Ids:
    """Special ids of a published tokenizer.

    Args:
        mask: the mask token.
        eos: end of an answer.
        pad: padding.
        stops: further ids that end an answer.
    """

    mask: int
    eos: int
    pad: int
    stops: tuple[int, ...] = ()

    def read(self, config: dict[str, Any], vocab: int) -> dict[str, Any]:
        """Special ids of a config.json as fields of `Spec`; absent ones are taken from here."""
        eos, others = end_ids(special(config, "eos_token_id", self.eos, vocab))
        stops = (*others, *self.implied(eos))
        pad = special(config, "pad_token_id", self.pad, vocab)
        return {
            "mask_id": special(config, "mask_token_id", self.mask, vocab),
            "eos_id": eos,
            "pad_id": eos if pad is None else pad,
            "stop_ids": tuple(dict.fromkeys(i for i in stops if i != eos and i < vocab)),
        }

    def write(self, spec: Spec) -> dict[str, Any]:
        """Special ids of a spec under their names in config.json."""
        implied = self.implied(spec.eos_id)
        stops = [i for i in spec.stop_ids if i not in implied]
        return {
            "mask_token_id": spec.mask_id,
            "eos_token_id": [spec.eos_id, *stops] if stops else spec.eos_id,
            "pad_token_id": spec.pad_id,
        }

    def implied(self, eos: int) -> tuple[int, ...]:
        """Stop ids a config.json need not list; only valid for the published tokenizer."""
        ends = (self.eos, *self.stops)
        return tuple(i for i in ends if i != eos) if eos in ends else ()


def read_config(
    family: type[Family],
    config: dict[str, Any],
    defaults: dict[str, Any],
    ids: Ids,
    switches: dict[str, Any] | None = None,
    rotary: float | None = None,
    **conventions: Any,
) -> Spec:
    """Converts a config.json to a spec.

    `attention_bias`, where the class has it, sets the biases of queries, keys, values and the
    output projection.

    Args:
        family: the family that reads it.
        config: config.json.
        defaults: values of absent keys, one of the tables above.
        ids: special ids of the family.
        switches: fields of TransformerConfig that no key of config.json determines.
        rotary: default of `partial_rotary_factor`; None if the family has no such key.
        **conventions: further fields of Spec.

    Raises:
        ValueError: the config has a setting that no published checkpoint uses.
    """
    c = filled(family.__name__, defaults, config)
    require(family.__name__, c, SUPPORTED)
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    rope, context = read_rope(c, rotary=rotary), c["max_position_embeddings"]
    if rope["rope"] is not None and rope["rope"].constant_up_to is not None:
        context = min(context, rope["rope"].constant_up_to)
    bias = "attention_bias" in defaults and bool(c["attention_bias"])
    transformer = TransformerConfig(
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=c.get("head_dim"),
        inner=c["intermediate_size"],
        eps=c["rms_norm_eps"],
        **rope,
        tied=c["tie_word_embeddings"],
        **{"qkv_bias": bias, "o_bias": bias} | (switches or {}),
    )
    return Spec(
        family=family.__module__.rpartition(".")[2],
        transformer=transformer,
        **ids.read(c, transformer.vocab),
        context=context,
        **conventions,
    )


def write_config(
    family: type[Family], spec: Spec, defaults: dict[str, Any], ids: Ids, **own: Any
) -> dict[str, Any]:
    """Converts a spec to the published config.json.

    Args:
        family: the family; its `read` must give an equal spec.
        spec: the model.
        defaults: values of absent keys.
        ids: special ids of the family.
        **own: keys that only this family has, and values that differ from the usual.

    Raises:
        ValueError: the published config.json cannot express the spec.
    """
    t = spec.transformer
    config = {
        **defaults,
        **ids.write(spec),
        "hidden_size": t.width,
        "intermediate_size": t.inner,
        "max_position_embeddings": spec.reach,
        "num_attention_heads": t.heads,
        "num_hidden_layers": t.layers,
        "num_key_value_heads": t.keys_heads,
        "rms_norm_eps": t.eps,
        "rope_theta": t.theta * t.theta_scale,
        "tie_word_embeddings": t.tied,
        "vocab_size": t.vocab,
    }
    if "attention_bias" in defaults:
        config["attention_bias"] = t.o_bias
    if "head_dim" in defaults or t.head_dim is not None:
        config["head_dim"] = t.head_dim
    if t.rope is not None:
        config["rope_scaling"] = t.rope.settings()
        config["max_position_embeddings"] = t.rope.max_position_embeddings or spec.reach
    config |= own
    wanted, written = _facts(spec), _facts(family.read(config, set()))
    expressible(family.__name__, {name: (wanted[name], written[name]) for name in wanted})
    return config


def _facts(spec: Spec) -> dict[str, Any]:
    """Values by which two specs are compared, in one canonical form."""
    t = spec.transformer
    return {
        **dataclasses.asdict(t),
        "theta": t.theta * t.theta_scale,
        "theta_scale": 1.0,
        "kv_heads": t.keys_heads,
        "head_dim": t.head_width,
        "mask_id": spec.mask_id,
        "eos_id": spec.eos_id,
        "pad_id": spec.pad_id,
        "shift": spec.shift,
        "attention": spec.attention,
        "block_size": None if spec.attention == "full" else spec.block_size,
        "context": spec.reach,
    }
