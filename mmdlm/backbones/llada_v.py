"""LLaDA-V's language model: LLaDA's function under LLaMA's names.

Source: ML-GSAI/LLaDA-V: train/llada_v_prepare/files (configuration_llada.py, modeling_llada.py),
train/llava/model/language_model/llava_llada.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.family import Family, Keys, Spec, architecture
from mmdlm.backbones.llada import END_OF_TEXT, END_OF_TURN
from mmdlm.backbones.llama_config import LLAMA, Ids, read_config, write_config
from mmdlm.backbones.llama_keys import LLAMA_KEYS

# The class's own defaults (eos 2) are LLaMA's, as is the bos of the published config.json.
IDS = Ids(mask=126336, eos=END_OF_TEXT, pad=END_OF_TEXT, stops=(END_OF_TURN,))


class LLaDAV(Family):
    """The text half of LLaDA-V; its image tower and projector are left aside.

    Unlike LLaDA's own code, this one rotates in the type of the activations.
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
        """The spec; absent keys mean what configuration_llada.py of LLaDA-V makes of them."""
        return read_config(cls, config, LLAMA, IDS, template="llada")

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec."""
        return write_config(
            cls, spec, LLAMA, IDS, architectures=["LLaDAModelLM"], model_type="llada"
        )
