"""Image encoder: a small vision transformer to train from scratch, or any of timm by its name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from encoders.checks import Count, Deviation, Factor, Mean, Side
from encoders.encoder import Encoder
from encoders.features import Features, Prepared
from encoders.image import ImageInput
from encoders.merging import Merging, is_mergeable, run
from encoders.small_vit import SmallViT

# What timm calls the sizes of a vision transformer.
TIMM = {
    "size": "img_size",
    "patch": "patch_size",
    "dim": "embed_dim",
    "depth": "depth",
    "heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "act": "act_layer",
}


class ViT(Encoder):
    """Encodes square images with a vision transformer, one token per patch.

    Without `name` a small transformer is built to be trained from scratch (defaults: 64x64 pixels,
    64 tokens of width 192). With `name` the sizes are the named model's; those given override it.

    Args:
        name: timm model, e.g. vit_so400m_patch14_siglip_384; see timm.list_models("vit*").
        size: image side in pixels (64).
        patch: patch side in pixels (8); a remainder at the right and bottom edge is not read.
        dim: token width E (192).
        depth: number of blocks before `layers` cuts them (2).
        heads: attention heads (6).
        mlp_ratio: width of each block's hidden layer over E (4).
        act: activation of the blocks, gelu (exact) or gelu_tanh. The published SigLIP so400m
            towers use gelu_tanh although timm names the exact one for them.
        stem: conv (stride-2 convolutions, trains faster from scratch) or patch; default conv
            without `name`, patch with it.
        mean: per channel, subtracted from pixels in [0, 1]; default the named model's, else 0.5.
        std: per channel, divides after `mean`; default the named model's, else 0.5.
        pretrained: download timm's weights for `name`.
        layers: keep only this number of blocks and return their output BEFORE the final norm;
            None runs all blocks and the final norm. LaViDa and LLaDA-V keep 26 of SigLIP's 27
            (jacklishufan/LaViDa: llava/model/multimodal_encoder/siglip_encoder.py).
    """

    kind = "image"

    # Ours to published (Hugging Face SigLIP names); `{i}` is the block. A tuple is concatenated
    # along the first axis. The position table is [N E] there and [1 N E] here, hence "[0]". The
    # pooling head (`vision_model.head.*`) has no counterpart; nor, with `layers`, post_layernorm.
    KEYS: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "vit.patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
        "vit.patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
        "vit.pos_embed[0]": "vision_model.embeddings.position_embedding.weight",
        **{
            f"vit.blocks.{{i}}.{ours}.{part}": f"vision_model.encoder.layers.{{i}}.{theirs}.{part}"
            for ours, theirs in (
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("attn.proj", "self_attn.out_proj"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            )
            for part in ("weight", "bias")
        },
        **{
            f"vit.blocks.{{i}}.attn.qkv.{part}": (
                f"vision_model.encoder.layers.{{i}}.self_attn.q_proj.{part}",
                f"vision_model.encoder.layers.{{i}}.self_attn.k_proj.{part}",
                f"vision_model.encoder.layers.{{i}}.self_attn.v_proj.{part}",
            )
            for part in ("weight", "bias")
        },
        "vit.norm.weight": "vision_model.post_layernorm.weight",
        "vit.norm.bias": "vision_model.post_layernorm.bias",
    }

    def __init__(
        self,
        name: str | None = None,
        *,
        size: Side | None = None,
        patch: Side | None = None,
        dim: Count | None = None,
        depth: Count | None = None,
        heads: Count | None = None,
        mlp_ratio: Factor | None = None,
        act: Literal["gelu", "gelu_tanh"] | None = None,
        stem: Literal["conv", "patch"] | None = None,
        mean: tuple[Mean, Mean, Mean] | None = None,
        std: tuple[Deviation, Deviation, Deviation] | None = None,
        pretrained: bool = False,
        layers: Count | None = None,
    ) -> None:
        super().__init__()
        if pretrained and name is None:
            raise ValueError("ViT: pretrained=True without a name; pass name=, a timm model")
        sizes = {"size": size, "patch": patch, "dim": dim, "depth": depth, "heads": heads}
        sizes |= {"mlp_ratio": mlp_ratio, "act": act}
        given = {option: value for option, value in sizes.items() if value is not None}
        if name is None:
            self.vit: nn.Module = SmallViT(**given, stem=stem or "conv")
        else:
            self.vit = _named(name, pretrained, given, stem or "patch")
        self.is_cut = layers is not None
        self._cut(layers)
        self.size = self.vit.patch_embed.img_size[0]
        self.grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)
        self.dim = self.vit.embed_dim
        published = getattr(self.vit, "pretrained_cfg", {}) if name else {}
        half = (0.5, 0.5, 0.5)
        self.preprocess = ImageInput(
            self.size, mean or published.get("mean") or half, std or published.get("std") or half
        )

    @property
    def attention_layer(self) -> tuple[nn.Module, int, int] | None:
        """See `Encoder.attention_layer`: of the last but one block of the whole transformer."""
        blocks = self.vit.blocks
        attention = blocks[-1 if self.is_cut or len(blocks) == 1 else -2].attn
        if not isinstance(getattr(attention, "qkv", None), nn.Linear):
            return None
        heads = getattr(attention, "heads", None) or attention.num_heads
        return attention.qkv, heads, self.vit.num_prefix_tokens

    @property
    def can_merge(self) -> bool:
        """See `Encoder.can_merge`."""
        return self.vit.num_prefix_tokens == 0 and all(map(is_mergeable, self.vit.blocks))

    def _cut(self, layers: int | None) -> None:
        """Drops the blocks after the first `layers`, and with them the final norm."""
        if layers is None:
            return
        depth = len(self.vit.blocks)
        if not 1 <= layers <= depth:
            raise ValueError(f"ViT: layers={layers} of a tower with {depth}; expected 1 to {depth}")
        # Deleted, not skipped: unused weights would cost memory and trip distributed training.
        self.vit.blocks = self.vit.blocks[:layers]
        self.vit.norm = nn.Identity()

    def forward(self, items: Sequence[Prepared]) -> Features:
        """One token per patch, row-major: tokens [B N E] on the `grid`, all real.

        Args:
            items: images [3 size size], or views [V 3 size size] that give V rows each.
        Raises:
            ValueError: no images, or one of another shape.
        """
        tokens = self.vit.forward_features(self._images(items))
        tokens = tokens[:, self.vit.num_prefix_tokens :]  # [B N E]
        return Features(tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool), self.grid)

    def merged(self, items: Sequence[Prepared], merging: Merging) -> tuple[Features, Tensor]:
        """See `Encoder.merged`; without class token only."""
        counts = merging.plan(math.prod(self.grid), len(self.vit.blocks))
        if not any(counts):
            features = self(items)
            places = torch.arange(features.mask.shape[1], device=features.mask.device)
            return replace(features, sizes=None), places.expand(features.mask.shape)
        tokens, places = run(self.vit, self._images(items), counts, merging)
        return Features(tokens, torch.ones_like(places, dtype=torch.bool)), places

    def _images(self, items: Sequence[Prepared]) -> Tensor:
        """Views [B 3 Y X] of all items, as the weights need them; see `forward`."""
        if len(items) == 0:
            raise ValueError("ViT: no images; pass at least one prepared image")
        shape = (3, self.size, self.size)
        for index, item in enumerate(items):
            if item.tensor.shape[-3:] != shape or item.tensor.ndim not in (3, 4):
                raise ValueError(
                    f"ViT: image {index} is {list(item.tensor.shape)}, expected {list(shape)}; "
                    "pass each image through prepare first"
                )
        weight = next(self.vit.parameters())
        images = torch.cat([item.tensor.view(-1, *shape) for item in items])  # [B C Y X]
        return images.to(weight.device, weight.dtype)

    @classmethod
    def tiny(cls) -> Self:
        """A 16x16-pixel encoder of 4 tokens of width 32."""
        return cls(size=16, patch=8, dim=32, depth=1, heads=2)

    @staticmethod
    def example(seed: int = 0) -> np.ndarray:
        """A random [20 24 3] uint8 image."""
        return np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def _named(name: str, pretrained: bool, given: dict[str, Any], stem: str) -> nn.Module:
    """The timm model `name` without pooling and head."""
    import timm  # here, because importing it takes longer than importing torch

    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('.')[0][:12]}*")[:5] or timm.list_models("vit*")[:5]
        raise ValueError(f"ViT: timm has no model {name!r}; near: {', '.join(near)}")
    if stem == "conv":
        raise ValueError("ViT: stem='conv' with a name; a named model has a fixed patch embedding")
    sizes = {TIMM[option]: value for option, value in given.items()}
    vit = timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="", **sizes)
    missing = [part for part in ("blocks", "patch_embed", "norm") if not hasattr(vit, part)]
    if missing:
        raise ValueError(
            f"ViT: {name} is a {type(vit).__name__} without {', '.join(missing)}; "
            "expected a vision transformer, see timm.list_models('vit*')"
        )
    return vit
