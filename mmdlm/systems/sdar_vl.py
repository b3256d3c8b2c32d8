"""SDAR-VL: transformers' LLaVA-OneVision layout with SDAR as its language model.

Checkpoints: JetLM/SDAR-VL-Instruct-4B, -8B and SDAR-VL-Think-4B, -8B.

Source: JetAstra/SDAR-VL: generate.py, training/llama_factory_sdar (template sdar_v);
huggingface/transformers: models/llava_onevision. The config.json of the checkpoints was seen in
part only.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.family import Keys, Spec, architecture, filled, require
from mmdlm.backbones.sdar import SDAR
from mmdlm.blueprint import Blueprint, describe
from mmdlm.model import MultimodalDLM
from mmdlm.systems.llava import (
    check_parts,
    read_projector,
    read_views,
    tiled,
    tower_keys,
    tower_sizes,
    vit,
    written_ratio,
)
from mmdlm.systems.system import System, backbone, renamed

NAME = "SDAR-VL"
TOWER, PROJECTOR, NEWLINE = (
    *("model.vision_tower.", "model.multi_modal_projector."),
    "model.image_newline",
)
LANGUAGE, HEAD = "model.language_model.", "lm_head."
PIXELS = "preprocessor_config.json"
HALF = [0.5, 0.5, 0.5]
IDS = ("mask_token_id", "eos_token_id", "pad_token_id")
# transformers' LlavaOnevisionConfig, for keys that are left out.
DEFAULTS: dict[str, Any] = {
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "vision_aspect_ratio": "anyres_max_9",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "multimodal_projector_bias": (True,),
    "projector_hidden_act": ("gelu",),
    "vision_feature_select_strategy": ("full",),
}
MOST = range(1, 7)  # tiles per side of a canvas, where config.json lists none
# generate.py: low_confidence_static, one token per step, blocks of the model.
STRATEGIES = [
    {"class_path": "mmdlm.decoding.caches.block_cache.BlockCache", "init_args": {}},
    {"class_path": "mmdlm.decoding.lengths.end_of_text.EndOfText", "init_args": {}},
]
TASKS: dict[str, dict[str, Any]] = {
    "caption": {
        "prompt": "Please describe the image in detail.",
        "length": 128,
        "strategies": STRATEGIES,
    },
    "answer": {"length": 128, "strategies": STRATEGIES},
    "generate": {"length": 128, "strategies": STRATEGIES},
}


class SDARVL(System):
    """SDAR with a SigLIP tower, whose views and grid are those of LLaVA-OneVision.

    A prompt is block-causal like the answer, images included; what is left of it after its last
    whole block belongs to the first generated block. The released sampling has temperature 1
    (`Gumbel`); the defaults here are deterministic, with a cache that is exact. Videos are not
    supported: pass frames as images.
    """

    TYPES: ClassVar[tuple[str, ...]] = ("llavaonevisionforconditionalgeneration", "llava_onevision")
    SIGNS: ClassVar[tuple[str, ...]] = (TOWER, "vision_tower.")
    FILES: ClassVar[tuple[str, ...]] = (PIXELS,)
    SPELLINGS: ClassVar[dict[str, tuple[str, ...]]] = {
        TOWER: (f"{TOWER}vision_model.", "vision_tower.vision_model.", "vision_tower."),
        PROJECTOR: ("multi_modal_projector.",),
        NEWLINE: ("image_newline",),
        LANGUAGE: ("language_model.model.",),
        HEAD: ("language_model.lm_head.",),
    }

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether the language model in config.json is SDAR (in others it is autoregressive)."""
        text = config.get("text_config")
        if not isinstance(text, dict):
            return False
        said = {str(text.get("model_type")).lower(), architecture(text).lower()}
        named = architecture(config) or config.get("model_type")
        is_layout = str(named).lower() in cls.TYPES
        return is_layout and bool(said & {*SDAR.TYPES} or "block_size" in text)

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        """The blueprint.

        Raises:
            ValueError: tower or projector are missing, or a setting is not supported.
        """
        kinds = {"text_config": {}, "vision_config": {}, PIXELS: {}, "image_grid_pinpoints": []}
        c = filled(NAME, DEFAULTS | kinds, config)
        require(NAME, c, SUPPORTED)
        check_parts(NAME, c, names, TOWER, PROJECTOR)
        spec, tower = _spec(c), _tower(c)
        given = {
            "image_aspect_ratio": c["vision_aspect_ratio"],
            "image_grid_pinpoints": _canvases(c["image_grid_pinpoints"], tower["size"]),
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_type": "mlp2x_gelu",
        }
        if not tiled(given["image_aspect_ratio"]):
            raise ValueError(
                f"{NAME}: vision_aspect_ratio is {given['image_aspect_ratio']!r}; expected "
                "anyres_max_N"
            )
        adapter = read_projector(NAME, given, tower["dim"], spec.transformer.width, None)
        adapter["init_args"]["rounded"] = True
        return Blueprint(
            spec=spec,
            encoders={"image": read_views(NAME, given, tower)},
            adapters={"image": adapter},
            template={"media": {"image": "{}"}, "system": "You are a helpful assistant."},
            tasks=TASKS,
        )

    @classmethod
    def keys(cls, blueprint: Blueprint) -> dict[str, tuple[str, Keys]]:
        """Prefix and names by part, as transformers' modules are named."""
        tower = {ours: to for ours, to in tower_keys(blueprint).items() if to is not None}
        encoder = blueprint.encoders["image"]["init_args"]["encoder"]["init_args"]
        unused = ("post_layernorm.*", "head.*", f"encoder.layers.{encoder['layers']}.*")
        language = backbone(SDAR)
        head = {ours: language.pop(ours) for ours in ("out.weight", "out.bias") if ours in language}
        projector = {
            f"project.layers.{i}.{part}": f"{PROJECTOR}linear_{number}.{part}"
            for i, number in ((0, 1), (2, 2))
            for part in ("weight", "bias")
        }
        return {
            "backbone": ("", renamed(language, "model.", LANGUAGE) | head),
            "encoders.image": (TOWER, renamed(tower, "vision_model.") | dict.fromkeys(unused)),
            "adapters.image": ("", projector | {"newline": NEWLINE}),
        }

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        """The published config.json and preprocessor_config.json."""
        blueprint = describe(model)
        encoder = blueprint.encoders["image"]["init_args"]
        adapter, arguments = blueprint.adapters["image"]["init_args"], encoder["encoder"]
        tower = arguments["init_args"]
        source = model.published.get("config.json", {})
        layer = source.get("vision_feature_layer", -1)
        given = {f"image_{key}": tower[key] for key in ("mean", "std") if tower.get(key)}
        return DEFAULTS | {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "model_type": "llava_onevision",
            "image_grid_pinpoints": [[h, w] for w, h in encoder["pinpoints"]],
            "text_config": SDAR.write(model.spec),
            "tie_word_embeddings": model.spec.transformer.tied,
            "vision_aspect_ratio": written_ratio(encoder, adapter),
            "vision_config": {
                "hidden_act": "gelu_pytorch_tanh",
                "model_type": "siglip_vision_model",
                **tower_sizes(tower, layer + 1),
            },
            "vision_feature_layer": layer,
            **({PIXELS: given} if given else {}),
        }


def _canvases(given: list[Any] | None, side: int) -> list[list[int]]:
    """Canvases as (width, height); in config.json they are (height, width)."""
    if not given:
        return [[side * j, side * i] for i in MOST for j in MOST]
    try:
        return [[width, height] for height, width in given]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{NAME}: image_grid_pinpoints is {given!r}; expected pairs of pixels"
        ) from error


def _spec(config: dict[str, Any]) -> Spec:
    """SDAR's spec, with the special ids of config.json itself where it has them."""
    text = dict(config["text_config"] or {})
    text |= {key: config[key] for key in IDS if config.get(key) is not None}
    tied = text.get("tie_word_embeddings") or config.get("tie_word_embeddings")
    return SDAR.read(text | {"tie_word_embeddings": bool(tied)}, set())


def _tower(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the `ViT`.

    Raises:
        ValueError: another layer is read, or the image processor does not fit the tower.
    """
    kinds = {"size": {}, "image_mean": [], "image_std": []}
    layer, pixels = config["vision_feature_layer"], filled(NAME, kinds, config[PIXELS] or {})
    if layer not in (-1, -2):
        raise ValueError(f"{NAME}: vision_feature_layer is {layer!r}, expected -1 or -2")
    tower = vit(NAME, config["vision_config"] or {}, layer + 1)
    side = (pixels["size"] or {}).get("height", tower["size"])
    if side != tower["size"]:
        raise ValueError(
            f"{NAME}: {PIXELS} has images of {side} pixels, but the tower in config.json takes "
            f"{tower['size']}; correct one of them"
        )
    for key in ("mean", "std"):
        value = pixels[f"image_{key}"]
        if value and value != HALF:
            tower[key] = value
    return tower
