"""Dream-v0-7B, Dream-Coder, DiffuCoder and their successor DreamReasoner-8B.

The first three are Qwen2.5 with bidirectional attention and shifted logits. The successor has the
same architecture name and is Qwen3 with block-causal attention, position i scoring token i.

Source: Dream-org on the hub: configuration_dream.py, modeling_dream.py (also NVlabs/Fast-dLLM:
dream/model, HKUNLP/Dream); the successor: SJTU-DENG-Lab/Diffulex: diffulex/model.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.family import Family, Keys, Spec, architecture, require
from mmdlm.backbones.llama_config import QWEN2, QWEN3, Ids, read_config, write_config
from mmdlm.backbones.llama_keys import LLAMA_KEYS

# <|endoftext|> and <|im_end|> of the published tokenizers; Instruct ends a turn with the latter.
IDS = Ids(mask=151666, eos=151643, pad=151643, stops=(151645,))
SUCCESSOR_IDS = Ids(mask=151669, eos=151643, pad=151643, stops=(151645,))
SUCCESSOR = QWEN3 | {"head_dim": None, "block_size": 32}


class Dream(Family):
    """Qwen2 layout with biases on queries, keys and values; the successor has Qwen3's norms."""

    TYPES: ClassVar[tuple[str, ...]] = ("dreammodel", "dreamforcausallm", "dream")
    KEYS: ClassVar[Keys] = LLAMA_KEYS

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether `architectures` or `model_type` names Dream."""
        named = architecture(config)
        typed = str(config.get("model_type", "")).lower() == "dream"
        return named in ("DreamModel", "DreamForCausalLM") or (typed and not named)

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; absent keys have the defaults of configuration_dream.py."""
        if _is_successor(config, names):
            return read_config(
                cls,
                config,
                SUCCESSOR,
                SUCCESSOR_IDS,
                {"qk_norm": "head"},
                attention="block_causal",
                block_size=config.get("block_size") or SUCCESSOR["block_size"],
                template="chatml",
            )
        require("Dream", config, {"use_mrope": (None, False)})
        # The class defines no end token; the published tokenizers use theirs as padding.
        end = config.get("eos_token_id")
        c = config | {"eos_token_id": config.get("pad_token_id") if end in (None, []) else end}
        return read_config(
            cls, c, QWEN2, IDS, {"qkv_bias": True}, shift=True, template="chatml_system"
        )

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec."""
        if spec.attention == "block_causal":
            return write_config(
                cls,
                spec,
                SUCCESSOR,
                SUCCESSOR_IDS,
                architectures=["DreamForCausalLM"],
                model_type="Dream",
                block_size=spec.block_size,
            )
        return write_config(cls, spec, QWEN2, IDS, architectures=["DreamModel"], model_type="Dream")


def _is_successor(config: dict[str, Any], names: set[str]) -> bool:
    """Whether it is the successor, by its tensors or, without them, by `block_size`."""
    if any(name.endswith("self_attn.q_norm.weight") for name in names):
        return True
    biases = any(name.endswith("self_attn.q_proj.bias") for name in names)
    return not biases and "block_size" in config
