"""What the systems in LLaVA's layout share: SigLIP tower, views, projector, merged grid.

Source: jacklishufan/LaViDa and ML-GSAI/LLaDA-V: llava/model/llava_arch.py,
llava/model/multimodal_encoder, llava/model/multimodal_projector/builder.py.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any, ClassVar

from mmdlm.backbones.family import Family, Keys, Spec, filled, require
from mmdlm.blueprint import Blueprint, describe
from mmdlm.model import MultimodalDLM
from mmdlm.recipe import Recipe
from mmdlm.systems.system import backbone, table

TOWER, PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."
# config.json names a public tower and does not repeat its sizes.
SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
TOWERS = {
    "google/siglip-so400m-patch14-384": SO400M,
    "google/siglip2-so400m-patch14-384": SO400M,
}
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


class LlavaLayout:
    """Reads and writes config.json and tensor names of a system in LLaVA's layout.

    The system files derive from this and from `System`, and say what differs.

    Attributes:
        NAME: of the system, for errors.
        FAMILY: family of the language model.
        NAMED: "architectures" and "model_type" of config.json.
        IMAGE: text around an image, "{}" in its place. "image_template" of config.json decides
            otherwise.
        TASKS: see `Blueprint.tasks`.
        TOWER_NAME: the published tower; a config.json that is written names it where sizes agree.
    """

    SIGNS: ClassVar[tuple[str, ...]] = ("mm_projector_type", PROJECTOR)
    NAME: ClassVar[str]
    FAMILY: ClassVar[type[Family]]
    NAMED: ClassVar[dict[str, Any]]
    IMAGE: ClassVar[str] = "{}\n"
    TASKS: ClassVar[dict[str, dict[str, Any]]] = {}
    TOWER_NAME: ClassVar[str] = "google/siglip-so400m-patch14-384"

    @classmethod
    def pool(cls, config: dict[str, Any], is_tiled: bool) -> str | None:
        """How the views of a still image are pooled after the projector; None for not at all.

        Args:
            config: config.json with `SUPPORTED` filled in.
            is_tiled: images are cut into tiles.
        """
        return None

    @classmethod
    def spec(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec of the language model."""
        return cls.FAMILY.read(config, names)

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        """The blueprint; absent keys mean what the source makes of them.

        Raises:
            ValueError: tower or projector are unknown or missing, or a setting is not supported.
        """
        kinds = {
            "image_aspect_ratio": "square",
            "mm_projector_type": "linear",
            "mm_vision_tower": "",
            "pooling_on": True,
            "tokenizer_model_max_length": 0,
            "image_template": cls.IMAGE,
        }
        filled(cls.NAME, kinds, config)
        c = {key: allowed[0] for key, allowed in SUPPORTED.items()} | config
        require(cls.NAME, c, SUPPORTED)
        check_parts(cls.NAME, c, names)
        spec = cls.spec(c, names)
        tower = read_tower(cls.NAME, c)
        given = c.get("mm_hidden_size", tower["dim"])
        if given != tower["dim"]:
            raise ValueError(
                f"{cls.NAME}: mm_hidden_size is {given}, but the width of the tower is "
                f"{tower['dim']}; correct config.json"
            )
        tiles = tiled(c.get("image_aspect_ratio"))
        return Blueprint(
            spec=spec,
            encoders={"image": read_views(cls.NAME, c, tower)},
            adapters={
                "image": read_projector(
                    cls.NAME, c, tower["dim"], spec.transformer.width, cls.pool(c, bool(tiles))
                )
            },
            template={
                "media": {"image": c.get("image_template", cls.IMAGE)},
                "system": SYSTEM_MESSAGE,
            },
            tasks=cls.TASKS,
        )

    @classmethod
    def keys(cls, blueprint: Blueprint) -> dict[str, tuple[str, Keys]]:
        """Prefix and names by part; what follows the last kept layer of the tower is not used."""
        adapter = table(blueprint.adapters["image"])
        if blueprint.adapters["image"]["init_args"]["layers"] == 1:  # no Sequential around it
            adapter = {o: to.replace(".{i}.", ".") for o, to in adapter.items()}
        return {
            "backbone": ("", backbone(cls.FAMILY)),
            "encoders.image": (TOWER, tower_keys(blueprint)),
            "adapters.image": ("", adapter),
        }

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        """The published config.json; `read` takes it back."""
        blueprint = describe(model)
        encoder = blueprint.encoders["image"]["init_args"]
        adapter = blueprint.adapters["image"]["init_args"]
        layers = adapter["layers"]
        pool = {} if adapter["pool"] is None else {"mm_spatial_pool_mode": adapter["pool"]}
        return cls.FAMILY.write(model.spec) | {
            **cls.NAMED,
            "hidden_size": model.spec.transformer.width,
            "image_aspect_ratio": written_ratio(encoder, adapter),
            "image_grid_pinpoints": encoder["pinpoints"],
            "image_template": blueprint.template["media"]["image"],
            "mm_hidden_size": adapter["in_dim"],
            "mm_newline_position": "grid",
            "mm_patch_merge_type": adapter["merge"],
            "mm_projector_type": f"mlp{layers}x_gelu" if layers > 1 else "linear",
            "mm_resampler_type": None,
            **pool,
            "tokenizer_model_max_length": model.spec.reach,
            "tokenizer_padding_side": "right",
            "use_mm_proj": True,
            **written_tower(encoder["encoder"]["init_args"], cls.TOWER_NAME),
        }


def check_parts(
    system: str,
    config: dict[str, Any],
    names: set[str],
    tower: str = TOWER,
    projector: str = PROJECTOR,
) -> None:
    """Raises unless there are tensors of tower and projector; no names are not checked.

    Args:
        system: its name.
        config: config.json.
        names: tensors of the checkpoint.
        tower: prefix of the tower.
        projector: prefix of the projector.

    Raises:
        ValueError: one of the two is missing.
    """
    if not names:
        return
    if not any(name.startswith(projector) for name in names):
        raise ValueError(
            f"{system}: the checkpoint holds no projector ({projector}*); put its tensors into the "
            "folder (a mm_projector.bin of the first training stage must be converted to "
            "safetensors)"
        )
    if not any(name.startswith(tower) for name in names):
        named = config.get("mm_vision_tower")
        where = f"{named!r} of config.json" if named else "the tower"
        raise ValueError(
            f"{system}: the checkpoint holds no vision tower ({tower}*), and {where} is not "
            "downloaded; put its weights into the folder under these names"
        )


def tiled(ratio: str | None) -> re.Match[str] | None:
    """The match of "anyres" or "anyres_max_N", None for single views."""
    return re.fullmatch(r"anyres(?:_max_(\d+))?", ratio or "")


def read_tower(system: str, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the `ViT` that config.json names or describes, without its last layer.

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
            f"{system}: the sizes of tower {name!r} are unknown; put them into config.json under "
            f"'vision_config' (keys {', '.join(SO400M)}), or name one of {', '.join(TOWERS)}"
        )
    return vit(system, sizes, -1)


def vit(system: str, sizes: dict[str, Any], last: int) -> dict[str, Any]:
    """Arguments of the `ViT` of a SigLIP tower whose hidden states before the final norm are read.

    Args:
        system: its name.
        sizes: transformers' config of the tower, see `SO400M`.
        last: layers that are not run, at most 0.

    Raises:
        ValueError: sizes are missing, or the tower is not supported.
    """
    absent = sorted(SO400M.keys() - sizes.keys())
    if absent:
        raise ValueError(f"{system}: the tower's sizes in config.json lack {', '.join(absent)}")
    sizes = filled(system, SO400M, sizes)
    given = {key: sizes[key] for key in TOWER_SUPPORTED if key in sizes}
    require(system, given, {key: TOWER_SUPPORTED[key] for key in given})
    kept, dim = sizes["num_hidden_layers"] + last, sizes["hidden_size"]
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


def tower_keys(blueprint: Blueprint) -> Keys:
    """Names of a tower inside `AnyRes`; what follows its last kept layer is not used."""
    tower = table(blueprint.encoders["image"]["init_args"]["encoder"])
    kept = {f"encoder.{o}": to for o, to in tower.items() if not o.startswith("vit.norm.")}
    return kept | {"vision_model.post_layernorm.*": None, "vision_model.head.*": None}


def tower_sizes(vit: dict[str, Any], last: int) -> dict[str, Any]:
    """Sizes of a tower as in its published config.json; the opposite of `vit`."""
    return {
        "hidden_size": vit["dim"],
        "image_size": vit["size"],
        "intermediate_size": int(vit["dim"] * vit["mlp_ratio"]),
        "num_attention_heads": vit["heads"],
        "num_hidden_layers": vit["layers"] - last,
        "patch_size": vit["patch"],
    }


def written_tower(vit: dict[str, Any], name: str) -> dict[str, Any]:
    """What config.json says about a tower, see `read_tower`.

    Args:
        vit: arguments of the `ViT`.
        name: the published tower.
    """
    sizes = tower_sizes(vit, -1)
    if TOWERS[name] == sizes:
        return {"mm_vision_tower": name}
    return {"mm_vision_tower": "siglip", "vision_config": sizes}


def read_views(system: str, config: dict[str, Any], tower: dict[str, Any]) -> Recipe:
    """Recipe of the tower with the views of `image_aspect_ratio`.

    Raises:
        ValueError: another aspect ratio, or tiles without canvases.
    """
    ratio, canvases = config.get("image_aspect_ratio"), config.get("image_grid_pinpoints")
    mode = "anyres" if tiled(ratio) else {None: "square"}.get(ratio, ratio)
    if mode not in ("anyres", "pad", "square"):
        raise ValueError(
            f"{system}: image_aspect_ratio is {ratio!r}; expected square, pad, anyres or "
            "anyres_max_N"
        )
    if mode == "anyres" and not canvases:
        raise ValueError(
            f"{system}: image_aspect_ratio is {ratio!r} without image_grid_pinpoints; config.json "
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


def written_ratio(encoder: dict[str, Any], adapter: dict[str, Any]) -> str:
    """`image_aspect_ratio` of the arguments of `AnyRes` and `LlavaGrid`."""
    if encoder["mode"] == "anyres" and adapter["most_tiles"] is not None:
        return f"anyres_max_{adapter['most_tiles']}"
    return encoder["mode"]


def read_projector(
    system: str, config: dict[str, Any], in_dim: int, out_dim: int, pool: str | None
) -> Recipe:
    """Recipe of projector, pooling and merging.

    Args:
        system: its name.
        config: config.json with `SUPPORTED` filled in.
        in_dim: width of the tower.
        out_dim: width of the language model.
        pool: see `LlavaLayout.pool`.

    Raises:
        ValueError: another projector.
    """
    kind = config.get("mm_projector_type") or "linear"
    found = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if found is None and kind != "linear":
        raise ValueError(f"{system}: mm_projector_type is {kind!r}; expected mlp2x_gelu or linear")
    tiles, merge = tiled(config.get("image_aspect_ratio")), config["mm_patch_merge_type"]
    has_most = tiles and tiles[1] and merge == "spatial_unpad"
    return {
        "class_path": "adapters.llava_grid.LlavaGrid",
        "init_args": {
            "in_dim": in_dim,
            "out_dim": out_dim,
            "merge": merge,
            "pool": pool,
            "most_tiles": int(tiles[1]) if has_most else None,
            "layers": int(found[1]) if found else 1,
        },
    }
