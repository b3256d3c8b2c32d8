"""DiffusionGemma with images: its language model, Gemma 4's vision tower and a projector.

Checkpoint: google/diffusiongemma-26B-A4B-it.

Source: huggingface/transformers: models/diffusion_gemma, models/gemma4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from mmdlm.backbones.diffusion_gemma import DiffusionGemma as Family
from mmdlm.backbones.family import Keys
from mmdlm.blueprint import Blueprint, describe
from mmdlm.model import MultimodalDLM
from mmdlm.recipe import Recipe
from mmdlm.systems.qwen_tower import PIXELS, part
from mmdlm.systems.system import System, backbone, table
from mmdlm.text import Tokenizer

PROCESSOR = "processor_config.json"
AROUND = {"boi_token_id": 255999, "eoi_token_id": 258882}
TOKENS = 280
LENGTH = 256
STRATEGIES: list[Recipe] = [
    part("mmdlm.decoding.commits.uniform_canvas.UniformCanvas"),
    part("mmdlm.decoding.lengths.end_of_text.EndOfText"),
]


class DiffusionGemma(System):
    """Answers questions about images of any aspect ratio, up to 280 tokens each.

    An image stands between two marker tokens, whose ids config.json gives; its tokens attend to one
    another in both directions.
    """

    TYPES: ClassVar[tuple[str, ...]] = Family.TYPES
    FILES: ClassVar[tuple[str, ...]] = (PIXELS, PROCESSOR)

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether it is DiffusionGemma with the vision tower."""
        tower = "model.encoder.vision_tower.patch_embedder.input_proj.weight"
        return tower in names and Family.matches(config, names)

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        """The blueprint; absent keys have the defaults of the configuration classes."""
        spec = Family.read(config, names)
        vision = {"model_type": "gemma4_vision"} | dict(config.get("vision_config") or {})
        tower = part("encoders.gemma_vision.GemmaVision", config=vision, tokens=_tokens(config))
        width = vision.get("hidden_size", 768)
        projector = part(
            "adapters.gemma_projector.GemmaProjector",
            in_dim=width,
            out_dim=spec.transformer.width,
        )
        usual = {"length": LENGTH, "strategies": STRATEGIES}
        return Blueprint(
            spec=spec,
            encoders={"image": tower},
            adapters={"image": projector},
            tasks={"caption": {"prompt": "Describe this image.", **usual}, "answer": usual},
        )

    @classmethod
    def with_tokenizer(cls, blueprint: Blueprint, tokenizer: Tokenizer) -> Blueprint:
        """The blueprint with the tokens around an image, where the tokenizer has them."""
        names = [tokenizer.backend.id_to_token(each) for each in AROUND.values()]
        if None in names:
            return blueprint
        media = {"image": f"{names[0]}{{}}{names[1]}"}
        return replace(blueprint, template=blueprint.template | {"media": media})

    @classmethod
    def keys(cls, blueprint: Blueprint) -> dict[str, tuple[str, Keys]]:
        """Prefix and names by part."""
        encoder = "model.encoder."
        return {
            "backbone": ("", backbone(Family)),
            "encoders.image": (f"{encoder}vision_tower.", table(blueprint.encoders["image"])),
            "adapters.image": (f"{encoder}embed_vision.", table(blueprint.adapters["image"])),
        }

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        """The published config.json; `read` takes it back."""
        encoder = describe(model).encoders["image"]["init_args"]
        files = {PIXELS: {"max_soft_tokens": encoder["tokens"]}}
        kept = files if encoder["tokens"] != TOKENS else {}
        return (
            Family.write(model.spec) | {"vision_config": dict(encoder["config"]), **AROUND} | kept
        )


def _tokens(config: dict[str, Any]) -> int:
    """Most tokens of an image, in either preprocessing file."""
    inside = (config.get(PROCESSOR) or {}).get("image_processor") or {}
    file = {**inside, **(config.get(PIXELS) or {})}
    return file.get("max_soft_tokens") or TOKENS
