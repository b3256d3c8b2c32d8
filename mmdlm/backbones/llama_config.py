"""The config.json of a LLaMA-like decoder, in transformers' words: to a spec and back.

Most families publish under these keys. They differ in what an absent key means, in their special
ids and in a few conventions; their own files say which.
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
    require,
    rotary_base,
    special,
)

# What an absent key means, by the configuration class of transformers a family derives from.
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
ROPE_THETA = 10_000.0
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
        eos: ends an answer.
        pad: stands in padding.
        stops: end an answer as well.
    """

    mask: int
    eos: int
    pad: int
    stops: tuple[int, ...] = ()

    def read(self, config: dict[str, Any], vocab: int) -> dict[str, Any]:
        """The ids of a config.json by their names in `Spec`; these ones where it has none."""
        eos, others = end_ids(special(config, "eos_token_id", self.eos, vocab))
        stops = (*others, *self.implied(eos))
        pad = self.pad if self.pad < vocab else eos
        return {
            "mask_id": special(config, "mask_token_id", self.mask, vocab),
            "eos_id": eos,
            "pad_id": special(config, "pad_token_id", pad, vocab),
            "stop_ids": tuple(dict.fromkeys(i for i in stops if i != eos and i < vocab)),
        }

    def write(self, spec: Spec) -> dict[str, Any]:
        """The ids of a spec by their names in config.json."""
        implied = self.implied(spec.eos_id)
        stops = [i for i in spec.stop_ids if i not in implied]
        return {
            "mask_token_id": spec.mask_id,
            "eos_token_id": [spec.eos_id, *stops] if stops else spec.eos_id,
            "pad_token_id": spec.pad_id,
        }

    def implied(self, eos: int) -> tuple[int, ...]:
        """Stops a config.json need not name; another tokenizer's ids would be other words."""
        return self.stops if eos in (self.eos, *self.stops) else ()


def read_config(
    family: type[Family],
    config: dict[str, Any],
    defaults: dict[str, Any],
    ids: Ids,
    switches: dict[str, Any] | None = None,
    **conventions: Any,
) -> Spec:
    """The spec of a config.json.

    Where the class has an `attention_bias`, it stands for biases on queries, keys and values and
    on the attention's output.

    Args:
        family: whose file this is.
        config: config.json.
        defaults: what an absent key means, one of the tables above.
        ids: the family's special ids.
        switches: fields of TransformerConfig that no key of config.json decides.
        **conventions: further fields of Spec.

    Raises:
        ValueError: the config asks for something no family here was published with.
    """
    c = defaults | config
    require(family.__name__, c, SUPPORTED)
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
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
        theta=rotary_base(c, ROPE_THETA),
        tied=c["tie_word_embeddings"],
        **{"qkv_bias": bias, "o_bias": bias} | (switches or {}),
    )
    return Spec(
        family=family.__module__.rpartition(".")[2],
        transformer=transformer,
        **ids.read(c, transformer.vocab),
        context=c["max_position_embeddings"],
        **conventions,
    )


def write_config(
    family: type[Family], spec: Spec, defaults: dict[str, Any], ids: Ids, **own: Any
) -> dict[str, Any]:
    """The published config.json of a spec.

    Args:
        family: reads it back, which must give the same model.
        spec: the model.
        defaults: what an absent key means.
        ids: the family's special ids.
        **own: keys of this family alone, and what differs from the usual.

    Raises:
        ValueError: the family's config.json has no way to say what the spec asks for.
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
    config |= own
    wanted, said = _facts(spec), _facts(family.read(config, set()))
    expressible(family.__name__, {name: (wanted[name], said[name]) for name in wanted})
    return config


def _facts(spec: Spec) -> dict[str, Any]:
    """What two specs of one model have in common, however they spell it."""
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
