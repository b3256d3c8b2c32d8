"""Fast-dLLM v2 (1.5B, 7B): Qwen2.5 with block-causal attention and shifted logits.

Source: Efficient-Large-Model on the hub: configuration.py, modeling.py (also NVlabs/Fast-dLLM: v2).
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.family import Family, Keys, Spec, architecture
from mmdlm.backbones.llama_config import QWEN2, Ids, read_config, write_config
from mmdlm.backbones.llama_keys import LLAMA_KEYS

BLOCK_SIZE = 32
# "|<MASK>|", in no config.json, <|im_end|> and <|endoftext|> of the published tokenizer.
IDS = Ids(mask=151665, eos=151645, pad=151645, stops=(151643,))


class FastDLLMv2(Family):
    """Qwen2's keys; `bd_size` is the block size of training."""

    TYPES: ClassVar[tuple[str, ...]] = ("fast_dllm_qwenforcausallm", "fast_dllm_qwen")
    KEYS: ClassVar[Keys] = LLAMA_KEYS

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether it is Fast-dLLM v2; version 1 has no separate weights."""
        named = architecture(config) or config.get("model_type")
        return named in ("Fast_dLLM_QwenForCausalLM", "Fast_dLLM_Qwen")

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; absent keys have the defaults of configuration.py."""
        return read_config(
            cls,
            config,
            QWEN2,
            IDS,
            {"qkv_bias": True},
            shift=True,
            attention="block_causal",
            block_size=config.get("bd_size") or BLOCK_SIZE,
            template="chatml_system",
        )

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec."""
        return write_config(
            cls,
            spec,
            QWEN2,
            IDS,
            architectures=["Fast_dLLM_QwenForCausalLM"],
            model_type="Fast_dLLM_Qwen",
            bd_size=spec.block_size,
        )
