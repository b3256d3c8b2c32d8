"""Open-dLLM (Open-dCoder): Qwen2.5 without its causal mask, shifted logits.

Source: pengzhangzhi/Open-dLLM: veomni/models/transformers/qwen2 (modeling_qwen2.py,
generation_utils.py), sample.py (mask token).
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.family import Family, Keys, Spec
from mmdlm.backbones.llama_config import QWEN2, Ids, read_config, write_config
from mmdlm.backbones.llama_keys import LLAMA_KEYS

# The mask token is added to Qwen2.5's tokenizer and gets its first free id.
IDS = Ids(mask=151665, eos=151643, pad=151643, stops=(151645,))


class OpenDLLM(Family):
    """Qwen2's keys and config.json without any difference, so `family=` must name it."""

    TYPES: ClassVar[tuple[str, ...]] = ("qwen2", "qwen2forcausallm")
    KEYS: ClassVar[Keys] = LLAMA_KEYS
    ON_REQUEST: ClassVar[tuple[str, ...]] = ("qwen2",)

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Always False: nothing distinguishes it from the autoregressive Qwen2."""
        return False

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; absent keys have the defaults of the Qwen2 class."""
        return read_config(cls, config, QWEN2, IDS, {"qkv_bias": True}, shift=True)

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec; loading it again needs `family="open_dllm"`."""
        return write_config(
            cls, spec, QWEN2, IDS, architectures=["Qwen2ForCausalLM"], model_type="qwen2"
        )
