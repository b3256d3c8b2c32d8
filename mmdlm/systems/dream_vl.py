"""Dream-VL: Dream-7B with Qwen2-VL's vision tower at native resolution.

Checkpoint: Dream-org/Dream-VL-7B.

Source: DreamLM/Dream-VLX: vl/train/dreamvl (configuration, image processing, model, decoding),
vl/README.md and vl/eval/eval_dream_vl.sh (settings).
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.dream import Dream
from mmdlm.backbones.family import Keys, architecture, require
from mmdlm.blueprint import Blueprint, describe
from mmdlm.model import MultimodalDLM
from mmdlm.recipe import Recipe
from mmdlm.systems import qwen_tower
from mmdlm.systems.qwen_tower import PIXELS, mlp, part, projector
from mmdlm.systems.system import System, backbone, table

# The config classes leave out of config.json what equals these defaults.
LANGUAGE: dict[str, Any] = {
    "mask_token_id": 151666,
    "pad_token_id": 151643,
    "projector_hidden_act": "gelu",
}
TENSORS = {"visual.patch_embed.proj.weight", "projector.linear_1.weight"}
NAMES = ("dream-vl", "dreamvlmodel")
# Entries of config.json that only a policy has; see `mmdlm.systems.dream_vla`.
POLICY = {"norm_stats", "n_action_bins", "unnorm_key", "num_actions_chunk"}
LENGTH = 128
# One token per step, most probable first. transformers 4, with which the checkpoint was published,
# puts "top_k": 50 into every config, and `diffusion_generate` takes its settings from there: the
# probabilities that order the commits are those among the 50 likeliest tokens.
STRATEGIES: list[Recipe] = [
    part("mmdlm.decoding.commits.timesteps.Timesteps"),
    part("mmdlm.decoding.guidance.nucleus.Nucleus", top_p=1.0, top_k=50),
]


class DreamVL(System):
    """Answers questions about images of any size, one token per 28 x 28 pixels.

    The positions of image tokens are one-dimensional, as those of text. The source also has
    three-dimensional ones, for images after a vision-start token. Its chat template writes none, so
    the checkpoint was trained and is used without them.
    """

    TYPES: ClassVar[tuple[str, ...]] = NAMES
    FILES: ClassVar[tuple[str, ...]] = (PIXELS,)

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether there are its tower and projector, and nothing says that it is a policy."""
        named = str(config.get("model_type") or architecture(config)).lower().replace("_", "-")
        return names >= TENSORS and (named in NAMES or not (named or POLICY & config.keys()))

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        """The blueprint; absent keys mean what the published classes make of them.

        Raises:
            ValueError: a setting is not supported, or files contradict each other.
        """
        c = LANGUAGE | config
        require("Dream-VL", c, {"projector_hidden_act": ("gelu", None)})
        spec = Dream.read(c, names)
        tower = qwen_tower.tower("Dream-VL", c)
        usual = {"length": LENGTH, "strategies": STRATEGIES}
        return Blueprint(
            spec=spec,
            encoders={"image": tower},
            adapters={"image": mlp(tower["init_args"]["dim"], spec.transformer.width)},
            tasks={"caption": {"prompt": "Describe this image", **usual}, "answer": usual},
        )

    @classmethod
    def keys(cls, blueprint: Blueprint) -> dict[str, tuple[str, Keys]]:
        """Prefix and names by part."""
        return {
            "backbone": ("", backbone(Dream)),
            "encoders.image": ("visual.", table(blueprint.encoders["image"])),
            "adapters.image": ("projector.", projector("linear_")),
        }

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        """The published config.json and preprocessing; `read` takes them back."""
        tower = describe(model).encoders["image"]["init_args"]
        read = model.published.get("config.json", {}) | model.published
        return Dream.write(model.spec) | {
            "architectures": ["DreamVLModel"],
            "model_type": "dream-vl",
            **qwen_tower.written(tower, read, model.spec.transformer.vocab),
        }
