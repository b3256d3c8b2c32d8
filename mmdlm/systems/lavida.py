"""LaViDa with a LLaDA backbone: SigLIP views, MLP projector with pooling, prefix-DLM decoding.

Checkpoints: jacklishufan/lavida-llada-v1.0-instruct, lavida-llada-1.0-fim, lavida-llada-1.0-lowres,
hbXNov/lavida-llada-reason.

Source: jacklishufan/LaViDa: llava/model/llava_arch.py, llava/model/multimodal_encoder,
llava/model/multimodal_projector/builder.py, llava/model/language_model/llava_llada.py.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import PurePath
from typing import Any

from mmdlm.backbones.family import Keys, Spec, filled, require
from mmdlm.backbones.llada import LLaDA, published_ids
from mmdlm.blueprint import Blueprint, describe
from mmdlm.model import MultimodalDLM
from mmdlm.recipe import Recipe
from mmdlm.systems.system import System, backbone, table

TOWER = "model.vision_tower.vision_tower."
# config.json names a public tower and does not repeat its sizes.
SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
TOWERS = {"google/siglip-so400m-patch14-384": SO400M}
TOWER_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "layer_norm_eps": (1e-6,),
    "num_channels": (3,),
}
# Each with what the source makes of an absent key first, or of one that it does not read.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mm_patch_merge_type": ("flat", "spatial", "spatial_unpad"),
    "mm_resampler_type": (None,),
    "mm_spatial_pool_mode": ("bilinear", "average", "max", None),
    "mm_use_im_start_end": (False,),
    "use_mm_proj": (True,),
}
SYSTEM_MESSAGE = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
# Training has "<image>\n" before a question, "{}\n" here. The released inference drops the first
# token after every image, the newline (llava/mm_utils.py: tokenizer_image_token).
AROUND_IMAGE = "{}"
# eval/run_coco_lowres.sh and eval/lmms_eval/tasks/coco_cap: the prompt is computed once, one step
# commits two tokens on average, many early. Answers of more than 128 tokens also take Blocks(128).
STRATEGIES: list[Recipe] = [
    {"class_path": "mmdlm.decoding.caches.prefix_lm.PrefixLM", "init_args": {}},
    {"class_path": "mmdlm.decoding.commits.time_shift.TimeShift", "init_args": {"shift": 0.33}},
]
TASKS: dict[str, dict[str, Any]] = {
    "caption": {
        "prompt": "Provide a one-sentence caption for the provided image.",
        "length": 32,
        "strategies": STRATEGIES,
    },
    "answer": {"length": 32, "strategies": STRATEGIES},
}


class LaViDa(System):
    r"""LLaDA, a SigLIP tower without its last layer, and a learnt end of each row of an image.

    Pooling (27x27 tokens of a view to 14x14) is not a key of the published config.json but an
    environment variable of the source. It is on for tiles ("anyres") and off for single views, as
    the published checkpoints were trained; "pooling_on": true or false in config.json decides
    otherwise.

    A question follows its image directly, as in the released inference. "image_template": "{}\n" in
    config.json puts the newline of training between them (`mmdlm.chat.Template.media`).
    """

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether LLaDA's own tensor names come with a projector (LLaDA-V has LLaMA's names)."""
        return "model.transformer.wte.weight" in names and any(
            name.startswith("model.mm_projector.") for name in names
        )

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        """The blueprint; absent keys mean what the source makes of them.

        Raises:
            ValueError: the tower is unknown, or a setting is not supported.
        """
        kinds = {
            "pooling_on": True,
            "tokenizer_model_max_length": 0,
            "image_template": AROUND_IMAGE,
        }
        filled("LaViDa", kinds, config)
        c = {key: allowed[0] for key, allowed in SUPPORTED.items()} | config
        require("LaViDa", c, SUPPORTED)
        spec = _spec(c, names)
        tower = _tower(c)
        given = c.get("mm_hidden_size", tower["dim"])
        if given != tower["dim"]:
            raise ValueError(
                f"LaViDa: mm_hidden_size is {given}, but the width of the tower is {tower['dim']}; "
                "correct config.json"
            )
        return Blueprint(
            spec=spec,
            encoders={"image": _encoder(c, tower)},
            adapters={"image": _adapter(c, tower["dim"], spec.transformer.width)},
            template={
                "media": {"image": c.get("image_template", AROUND_IMAGE)},
                "system": SYSTEM_MESSAGE,
            },
            tasks=TASKS,
        )

    @classmethod
    def keys(cls, blueprint: Blueprint) -> dict[str, tuple[str, Keys]]:
        """Prefix and names by part; what follows the last kept layer of the tower is not used."""
        tower = table(blueprint.encoders["image"]["init_args"]["encoder"])
        kept = {f"encoder.{o}": to for o, to in tower.items() if not o.startswith("vit.norm.")}
        unused = {"vision_model.post_layernorm.*": None, "vision_model.head.*": None}
        adapter = table(blueprint.adapters["image"])
        if blueprint.adapters["image"]["init_args"]["layers"] == 1:  # no Sequential around it
            adapter = {o: to.replace(".{i}.", ".") for o, to in adapter.items()}
        return {
            "backbone": ("", backbone(LLaDA)),
            "encoders.image": (TOWER, kept | unused),
            "adapters.image": ("", adapter),
        }

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        """The published config.json; `read` takes it back."""
        blueprint = describe(model)
        encoder = blueprint.encoders["image"]["init_args"]
        adapter = blueprint.adapters["image"]["init_args"]
        ratio, layers = encoder["mode"], adapter["layers"]
        if ratio == "anyres" and adapter["most_tiles"] is not None:
            ratio = f"anyres_max_{adapter['most_tiles']}"
        return LLaDA.write(model.spec) | {
            "architectures": ["LlavaLladaForMaskedDiffusion"],
            "model_type": "llava_llada",
            "hidden_size": model.spec.transformer.width,
            "image_aspect_ratio": ratio,
            "image_grid_pinpoints": encoder["pinpoints"],
            "image_template": blueprint.template["media"]["image"],
            "mm_hidden_size": adapter["in_dim"],
            "mm_newline_position": "grid",
            "mm_patch_merge_type": adapter["merge"],
            "mm_projector_type": f"mlp{layers}x_gelu" if layers > 1 else "linear",
            "mm_resampler_type": None,
            "mm_spatial_pool_mode": adapter["pool"] or "bilinear",
            "pooling_on": adapter["pool"] is not None,
            "tokenizer_model_max_length": model.spec.reach,
            "tokenizer_padding_side": "right",
            "use_mm_proj": True,
            **_written_tower(encoder["encoder"]["init_args"]),
        }


def _spec(config: dict[str, Any], names: set[str]) -> Spec:
    """LLaDA's spec, with the ids that the source has as constants where config.json is silent."""
    vocab = config.get("embedding_size") or config.get("vocab_size")
    if not vocab:
        raise ValueError("LaViDa: config.json has no vocab_size; it must say the vocabulary's size")
    spec = LLaDA.read(config | published_ids(config, vocab), names)
    longest = config.get("tokenizer_model_max_length") or 0
    return dataclasses.replace(spec, context=max(spec.context, longest))


def _tower(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the `ViT` that config.json names or describes.

    Raises:
        ValueError: it does neither, or the tower is not supported.
    """
    name = config.get("mm_vision_tower")
    tables = (each for each in config.values() if isinstance(each, dict))
    sizes = next((table for table in tables if "patch_size" in table), None)
    if sizes is None:
        # A training run writes the folder the tower came from.
        known = {PurePath(known).name: sizes for known, sizes in TOWERS.items()}
        sizes = known.get(PurePath(name or "").name)
    if sizes is None:
        raise ValueError(
            f"LaViDa: the sizes of tower {name!r} are unknown; put them into config.json under "
            f"'vision_config' (keys {', '.join(SO400M)}), or name one of {', '.join(TOWERS)}"
        )
    absent = sorted(SO400M.keys() - sizes.keys())
    if absent:
        raise ValueError(f"LaViDa: the tower's sizes in config.json lack {', '.join(absent)}")
    given = {key: sizes[key] for key in TOWER_SUPPORTED if key in sizes}
    require("LaViDa", given, {key: TOWER_SUPPORTED[key] for key in given})
    kept, dim = sizes["num_hidden_layers"] - 1, sizes["hidden_size"]
    return {
        "size": sizes["image_size"],
        "patch": sizes["patch_size"],
        "dim": dim,
        "depth": kept,
        "heads": sizes["num_attention_heads"],
        # The half keeps the product above the integer it is rounded down to.
        "mlp_ratio": (sizes["intermediate_size"] + 0.5) / dim,
        "act": "gelu_tanh",
        "stem": "patch",
        "layers": kept,
    }


def _written_tower(vit: dict[str, Any]) -> dict[str, Any]:
    """What config.json says about a tower, see `_tower`."""
    sizes = {
        "hidden_size": vit["dim"],
        "image_size": vit["size"],
        "intermediate_size": int(vit["dim"] * vit["mlp_ratio"]),
        "num_attention_heads": vit["heads"],
        "num_hidden_layers": vit["layers"] + 1,
        "patch_size": vit["patch"],
    }
    named = [name for name, known in TOWERS.items() if known == sizes]
    return (
        {"mm_vision_tower": named[0]}
        if named
        else {
            "mm_vision_tower": "siglip",
            "vision_config": sizes,
        }
    )


def _encoder(config: dict[str, Any], tower: dict[str, Any]) -> Recipe:
    """Recipe of the tower with the views of `image_aspect_ratio`.

    Raises:
        ValueError: another aspect ratio, or tiles without canvases.
    """
    ratio, canvases = config.get("image_aspect_ratio"), config.get("image_grid_pinpoints")
    mode = "anyres" if _tiles(ratio) else {None: "square"}.get(ratio, ratio)
    if mode not in ("anyres", "pad", "square"):
        raise ValueError(
            f"LaViDa: image_aspect_ratio is {ratio!r}; expected square, pad, anyres or anyres_max_N"
        )
    if mode == "anyres" and not canvases:
        raise ValueError(
            f"LaViDa: image_aspect_ratio is {ratio!r} without image_grid_pinpoints; config.json "
            "must list the canvases"
        )
    return {
        "class_path": "encoders.anyres.AnyRes",
        "init_args": {
            "encoder": {"class_path": "encoders.vit.ViT", "init_args": tower},
            "pinpoints": canvases or [],
            "mode": mode,
        },
    }


def _adapter(config: dict[str, Any], in_dim: int, out_dim: int) -> Recipe:
    """Recipe of projector, pooling and merging.

    Raises:
        ValueError: another projector.
    """
    kind = config.get("mm_projector_type") or "linear"
    found = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if found is None and kind != "linear":
        raise ValueError(f"LaViDa: mm_projector_type is {kind!r}; expected mlp2x_gelu or linear")
    tiles = _tiles(config.get("image_aspect_ratio"))
    merge, pool = config["mm_patch_merge_type"], config["mm_spatial_pool_mode"]
    return {
        "class_path": "adapters.llava_grid.LlavaGrid",
        "init_args": {
            "in_dim": in_dim,
            "out_dim": out_dim,
            "merge": merge,
            "pool": pool if config.get("pooling_on", tiles is not None) else None,
            "most_tiles": int(tiles[1])
            if tiles and tiles[1] and merge == "spatial_unpad"
            else None,
            "layers": int(found[1]) if found else 1,
        },
    }


def _tiles(ratio: str | None) -> re.Match[str] | None:
    """The match of "anyres" or "anyres_max_N", None for single views."""
    return re.fullmatch(r"anyres(?:_max_(\d+))?", ratio or "")
