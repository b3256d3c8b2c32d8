"""SDAR and TraDo: Qwen3 with block-causal attention.

Source: JetAstra/SDAR: training/model/SDAR-8B-Chat (configuration_sdar.py, modeling_sdar.py,
generation_config.json); Gen-Verse/dLLM-RL: models/sdar.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.family import Family, Keys, Spec, architecture
from mmdlm.backbones.llama_config import QWEN3, Ids, read_config, write_config
from mmdlm.backbones.llama_keys import LLAMA_KEYS

BLOCK_SIZE = 4
# "<MASK>", <|endoftext|> and <|im_end|> of the published tokenizer.
IDS = Ids(mask=151669, eos=151643, pad=151643, stops=(151645,))


class SDAR(Family):
    """Qwen3's keys; the released block size is 4, which some config.json omit."""

    TYPES: ClassVar[tuple[str, ...]] = ("sdarforcausallm", "sdar")
    KEYS: ClassVar[Keys] = LLAMA_KEYS

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether it is dense SDAR; the mixture of experts has a separate architecture."""
        named = architecture(config)
        return named == "SDARForCausalLM" or (not named and config.get("model_type") == "sdar")

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; absent keys have the defaults of configuration_sdar.py."""
        return read_config(
            cls,
            config,
            QWEN3,
            IDS,
            {"qk_norm": "head"},
            attention="block_causal",
            block_size=config.get("block_size") or BLOCK_SIZE,
            template="chatml",
        )

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec."""
        return write_config(
            cls,
            spec,
            QWEN3,
            IDS,
            architectures=["SDARForCausalLM"],
            model_type="sdar",
            block_size=spec.block_size,
        )
