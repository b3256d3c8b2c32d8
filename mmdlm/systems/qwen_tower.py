"""What systems with Qwen's vision towers share: config.json and the preprocessing file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdlm.backbones.family import Keys, filled, require
from mmdlm.recipe import Recipe

PIXELS = "preprocessor_config.json"
# The config classes leave out of config.json what equals these defaults.
VISION: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_act": "quick_gelu",
    "hidden_size": 3584,
    "in_channels": 3,
    "mlp_ratio": 4,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
"""Defaults of vision_config in Dream-VL and Dream-VLA."""
PATCHES: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 3211264,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""The published preprocessor_config.json of Dream-VL and Dream-VLA."""
IMAGE_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
}
TOWER = {
    "depth": "depth",
    "width": "embed_dim",
    "dim": "hidden_size",
    "mlp_ratio": "mlp_ratio",
    "heads": "num_heads",
    "patch": "patch_size",
    "merge": "spatial_merge_size",
    "frames": "temporal_patch_size",
}
"""Arguments of `QwenVision` and their published names in vision_config."""
PREPROCESSING = {
    "patch": "patch_size",
    "merge": "merge_size",
    "frames": "temporal_patch_size",
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
    "mean": "image_mean",
    "std": "image_std",
}
"""Arguments of `PatchInput` and their published names in preprocessor_config.json."""


def part(path: str, **arguments: Any) -> Recipe:
    """The recipe of a class and its arguments."""
    return {"class_path": path, "init_args": arguments}


def mlp(in_dim: int, out_dim: int) -> Recipe:
    """Recipe of a projector of two layers."""
    return part("adapters.mlp.MLP", in_dim=in_dim, out_dim=out_dim, layers=2)


def projector(name: str) -> Keys:
    """Names of the two linear layers of `mlp`, published as `name`1 and `name`2."""
    return {
        f"layers.{ours}.{of}": f"{name}{published}.{of}"
        for ours, published in ((0, 1), (2, 2))
        for of in ("weight", "bias")
    }


def tower(system: str, config: Mapping[str, Any]) -> Recipe:
    """Recipe of a Qwen2-VL tower.

    Args:
        system: name for errors.
        config: config.json, and preprocessor_config.json under its name.

    Raises:
        ValueError: the preprocessing cuts other patches than the tower takes, or a setting is not
            supported.
    """
    vision = filled(system, VISION, config.get("vision_config") or {})
    require(system, vision, {name: (VISION[name],) for name in ("hidden_act", "in_channels")})
    sizes = {ours: vision[published] for ours, published in TOWER.items()}
    given = preprocessing(config, PATCHES)
    check_patches(system, sizes, given)
    return part("encoders.qwen_vision.QwenVision", **sizes | given)


def preprocessing(config: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `PatchInput` in preprocessor_config.json.

    Args:
        config: config.json, and preprocessor_config.json under its name.
        usual: values of absent keys, under their published names.
    """
    file = config.get(PIXELS) or {}
    limits = file.get("size") or {}  # transformers 5 moves them there, under the second names
    moved = {
        "min_pixels": limits.get("min_pixels", limits.get("shortest_edge")),
        "max_pixels": limits.get("max_pixels", limits.get("longest_edge")),
    }
    given = {**usual, **{name: v for name, v in (moved | file).items() if v is not None}}
    return {ours: given[name] for ours, name in PREPROCESSING.items() if name in given}


def check_patches(system: str, sizes: Mapping[str, Any], pixels: Mapping[str, Any]) -> None:
    """Raises unless tower and preprocessing agree.

    Raises:
        ValueError: the preprocessing cuts other patches than the tower takes.
    """
    differ = [PREPROCESSING[ours] for ours in sizes.keys() & pixels if sizes[ours] != pixels[ours]]
    if differ:
        raise ValueError(
            f"{system}: {', '.join(differ)} of {PIXELS} and vision_config of config.json differ; "
            "they are of different checkpoints"
        )


def written(made: Mapping[str, Any], read: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    """What config.json and preprocessor_config.json say of a Qwen2-VL tower.

    Args:
        made: arguments of `QwenVision`.
        read: the files the model was loaded from, by name, and the entries of config.json.
        vocab: rows of the embedding; ids beyond it are left out.
    """
    vision = read.get("vision_config") or {"hidden_act": "quick_gelu", "in_channels": 3}
    ids = IMAGE_IDS | {name: read[name] for name in IMAGE_IDS if name in read}
    return {
        **{name: each for name, each in ids.items() if name in read or each < vocab},
        "projector_hidden_act": "gelu",
        "vision_config": vision | {TOWER[ours]: made[ours] for ours in TOWER},
        PIXELS: (read.get(PIXELS) or {}) | {PREPROCESSING[o]: made[o] for o in PREPROCESSING},
    }
