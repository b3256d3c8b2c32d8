"""DiffusionVL: Qwen2.5-VL converted to block diffusion.

Checkpoints: hustvl/DiffusionVL-Qwen2.5VL-3B and -7B, and what its converter makes of Qwen2.5-VL.

Source: hustvl/DiffusionVL: train/llava/model/language_model/llava_diffusionvl_qwenvl.py (text model
and decoding), train/llava/model/multimodal_encoder/qwen_vision_tower.py,
scripts/diffusionvl_prepare/convert_qwen2.5vl_to_diffusionvl.py (layout),
train/scripts/diffusionvl_qwenvl_finetune.sh (settings).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmdlm.backbones.a2d import A2D
from mmdlm.backbones.family import Keys, Spec, filled, require
from mmdlm.blueprint import Blueprint, describe
from mmdlm.model import MultimodalDLM
from mmdlm.recipe import Recipe
from mmdlm.systems.qwen_tower import PIXELS, PREPROCESSING, check_patches, part, preprocessing
from mmdlm.systems.system import Beside, System, backbone, table

VISION_FILE = "vision_config.json"
TOWER_PREFIX, MERGER_PREFIX = "model.vision_tower.vision_tower.", "model.mm_projector.merger."
MASK = 151671
BLOCK = 4
"""Block size where config.json has none: files leave out the default of the config's class."""
# transformers' Qwen2_5_VLVisionConfig, with the sizes of the published towers.
VISION: dict[str, Any] = {
    "depth": 32,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
    "hidden_size": 1280,
    "in_channels": 3,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
}
TOWER = {
    "depth": "depth",
    "full": "fullatt_block_indexes",
    "heads": "num_heads",
    "inner": "intermediate_size",
    "width": "hidden_size",
    "window": "window_size",
    "patch": "patch_size",
    "merge": "spatial_merge_size",
    "frames": "temporal_patch_size",
}
"""Arguments of `Qwen25Vision` and their published names in vision_config."""
PATCHES: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# The source reads these from config.json, not from the preprocessing file, which is Qwen2.5-VL's.
LIMITS = {"min_pixels": 384 * 384, "max_pixels": 512 * 512}
SHAPES = ("pad", "square", None)
# One token per step in blocks of the model's size, most probable first (low_confidence_static).
STRATEGIES: list[Recipe] = [
    part("mmdlm.decoding.commits.dynamic.Dynamic", tau=1.0),
    part("mmdlm.decoding.lengths.end_of_text.EndOfText"),
]
LENGTH = 128
SYSTEM_MESSAGE = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
AFTER_IMAGE = "{}\n"


class DiffusionVL(System):
    r"""Qwen2.5 with block-causal attention over prompt, image and answer; aligned logits.

    Positions are one-dimensional: the three-dimensional ones of Qwen2.5-VL are dropped. The tower's
    last hidden layer is used whatever "mm_vision_select_layer" is, as in the source.

    Two layouts are read and written back as they were: that of the converter, with
    `vision_tower.safetensors` and `projector.safetensors` beside the text model and
    `vision_config.json`; and that of the trainer, with everything in one checkpoint.

    "image_aspect_ratio": "pad" in config.json makes images square before they are resized, which is
    the default, as the published models were trained so. "mask_token_id" replaces the published id,
    "image_template" the text around an image ("{}\n").
    """

    TYPES: ClassVar[tuple[str, ...]] = ("diffusionvl_qwenvl", "diffusionvlqwenvlforcausallm")
    FILES: ClassVar[tuple[str, ...]] = (VISION_FILE, PIXELS)
    WEIGHTS: ClassVar[tuple[Beside, ...]] = (
        Beside("vision_tower.safetensors", TOWER_PREFIX),
        Beside("projector.safetensors", MERGER_PREFIX),
    )

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether `model_type` or `architectures` names it."""
        named = (config.get("model_type"), *(config.get("architectures") or ()))
        return any(str(name).lower() in cls.TYPES for name in named)

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        """The blueprint; absent keys mean what the published classes make of them.

        Raises:
            ValueError: a setting is not supported, or files contradict each other.
        """
        shape = config.get("image_aspect_ratio", "pad")
        require("DiffusionVL", {"image_aspect_ratio": shape}, {"image_aspect_ratio": SHAPES})
        spec = _spec(config, names)
        given = config.get(VISION_FILE) or config.get("vision_config") or {}
        vision = filled("DiffusionVL", VISION, given)
        require("DiffusionVL", vision, {n: (VISION[n],) for n in ("hidden_act", "in_channels")})
        width = spec.transformer.width
        if vision["out_hidden_size"] != width:
            raise ValueError(
                f"DiffusionVL: out_hidden_size of the tower is {vision['out_hidden_size']}, but "
                f"hidden_size of the text model {width}; the files are of different checkpoints"
            )
        sizes = {ours: vision[published] for ours, published in TOWER.items()}
        limits = {key: config.get(key) or usual for key, usual in LIMITS.items()}
        pixels = preprocessing(config, PATCHES) | limits
        check_patches("DiffusionVL", sizes, pixels)
        tower = part("encoders.qwen25_vision.Qwen25Vision", **sizes | pixels, square=shape == "pad")
        merge = vision["spatial_merge_size"]
        dim = vision["hidden_size"] * merge**2
        merger = part("adapters.qwen_merger.QwenMerger", in_dim=dim, out_dim=width, merge=merge)
        usual = {"length": LENGTH, "strategies": STRATEGIES}
        return Blueprint(
            spec=spec,
            encoders={"image": tower},
            adapters={"image": merger},
            template={
                "media": {"image": config.get("image_template", AFTER_IMAGE)},
                "system": SYSTEM_MESSAGE,
            },
            tasks={"caption": {"prompt": "Describe this image.", **usual}, "answer": usual},
        )

    @classmethod
    def keys(cls, blueprint: Blueprint) -> dict[str, tuple[str, Keys]]:
        """Prefix and names by part."""
        return {
            "backbone": ("", backbone(A2D)),
            "encoders.image": (TOWER_PREFIX, table(blueprint.encoders["image"])),
            "adapters.image": (MERGER_PREFIX, table(blueprint.adapters["image"])),
        }

    @classmethod
    def apart(cls, model: MultimodalDLM) -> tuple[Beside, ...]:
        """The converter's files where the model was loaded from them."""
        return cls.WEIGHTS if VISION_FILE in model.published else ()

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        """The published config.json and the files beside it; `read` takes them back."""
        blueprint = describe(model)
        tower = blueprint.encoders["image"]["init_args"]
        read = model.published.get("config.json", {}) | model.published
        text = A2D.write(model.spec)
        del text["block_size"]
        vision = {name: VISION[name] for name in ("hidden_act", "in_channels")}
        vision |= {TOWER[ours]: _plain(tower[ours]) for ours in TOWER}
        vision["out_hidden_size"] = model.spec.transformer.width
        config = text | {
            "architectures": ["DiffusionVLQwenVLForCausalLM"],
            "model_type": cls.TYPES[0],
            "bd3lm_block_size": model.spec.block_size,
            "enable_bd3lm": True,
            "image_aspect_ratio": "pad" if tower["square"] else "square",
            "image_template": blueprint.template["media"]["image"],
            "vision_config": vision,
            PIXELS: {PREPROCESSING[o]: _plain(tower[o]) for o in PREPROCESSING if o not in LIMITS},
            **{key: tower[key] for key in LIMITS},
        }
        if "text_config" in read:
            config["text_config"] = {k: v for k, v in text.items() if k in read["text_config"]}
        return config | ({VISION_FILE: vision} if VISION_FILE in read else {})


def _spec(config: Mapping[str, Any], names: set[str]) -> Spec:
    """The spec of the text model, whose settings may be nested, and win there."""
    own = {k: v for k, v in config.items() if k not in ("text_config", "vision_config")}
    ids = {k: v for k, v in own.items() if k.endswith("token_id") and v is not None}
    inner = {k: v for k, v in (config.get("text_config") or {}).items() if v is not None}
    c = {**own, **inner, **ids}
    if (c.get("vocab_size") or 0) > MASK:
        c.setdefault("mask_token_id", MASK)
    if names and "lm_head.weight" not in names:  # files say otherwise of the 3B model
        c["tie_word_embeddings"] = True
    for name in ("rope_scaling", "rope_parameters"):
        given = c.get(name) or {}
        # The three axes have equal positions, which leaves the usual rotation.
        if given.get("rope_type", given.get("type")) in ("mrope", "default"):
            c[name] = {"rope_theta": given["rope_theta"]} if "rope_theta" in given else None
    size = config.get("bd3lm_block_size") or BLOCK
    return A2D.read({**c, "model_type": "a2d-qwen2", "block_size": size}, names)


def _plain(value: Any) -> Any:
    """The value with lists in place of tuples, as JSON has them."""
    return list(value) if isinstance(value, tuple) else value
