"""LLaDA-V's language model: LLaDA's architecture under LLaMA's tensor names.

Source: ML-GSAI/LLaDA-V: train/llada_v_prepare/files (configuration_llada.py, modeling_llada.py),
train/llava/model/language_model/llava_llada.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.family import Family, Keys, Spec, architecture
from mmdlm.backbones.llada import END_OF_TEXT, END_OF_TURN
from mmdlm.backbones.llama_config import LLAMA, Ids, read_config, write_config
from mmdlm.backbones.llama_keys import LLAMA_KEYS

# The defaults of the class (eos 2) and the bos of the published config.json are LLaMA's.
IDS = Ids(mask=126336, eos=END_OF_TEXT, pad=END_OF_TEXT, stops=(END_OF_TURN,))


class LLaDAV(Family):
    """Language model of LLaDA-V; image tower and projector are ignored.

    Unlike in LLaDA, rotary positions are applied in the dtype of the activations.
    """

    TYPES: ClassVar[tuple[str, ...]] = (
        *("lladamodellm", "llada", "llavalladamodellm", "llava_llada"),
    )
    KEYS: ClassVar[Keys] = {
        **LLAMA_KEYS,
        "model.vision_tower.*": None,
        "model.mm_projector.*": None,
        "model.image_newline": None,
    }

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether it is LLaDA by name, with LLaMA's config keys or tensors, and dense."""
        named = architecture(config) or config.get("model_type")
        if named not in ("LLaDAModelLM", "llada", "LlavaLLaDAModelLM", "llava_llada"):
            return False
        original = any(name.endswith("transformer.wte.weight") for name in names)
        experts = "num_experts" in config or any(".experts." in name for name in names)
        return "hidden_size" in config and not original and not experts

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; absent keys have the defaults of LLaDA-V's configuration_llada.py."""
        return read_config(cls, config, LLAMA, IDS, template="llada")

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec."""
        return write_config(
            cls, spec, LLAMA, IDS, architectures=["LLaDAModelLM"], model_type="llada"
        )
