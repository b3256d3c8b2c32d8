"""Image encoder: a small vision transformer to train from scratch, or any of timm by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from encoders.encoder import Encoder
from encoders.features import Features, Prepared
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


@dataclass(frozen=True)
class ImageInput:
    """Normalised pixels of one image, resized (bicubic) to a square without keeping its aspect.

    Args:
        size: side in pixels.
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, divides after `mean`.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"ViT: mean={self.mean}, std={self.std}; expected three numbers each, std > 0"
            )

    def __call__(self, item: Any) -> Prepared:
        """Pixels [3 size size] float32 of an image, with its original size.

        Args:
            item: path, PIL image, or [Y X 3] / [3 Y X] / [Y X] array or tensor, uint8 in 0..255
                or float in 0..1. Transparent pixels are shown on white.
        Raises:
            ValueError: not such an image, or values that are not finite or out of range.
        """
        side = self.size
        if isinstance(item, np.ndarray) and item.shape == (side, side, 3) and item.dtype == "uint8":
            pixels, size = torch.from_numpy(np.ascontiguousarray(item)), (side, side)  # [Y X C]
        else:
            image = as_rgb(item)
            size = (image.height, image.width)
            if image.size != (side, side):
                image = image.resize((side, side), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(image))  # [Y X C]
        return Prepared("image", self.normalize(pixels), size)

    def normalize(self, pixels: Tensor) -> Tensor:
        """[... 3 Y X] float32 of uint8 pixels [... Y X 3]."""
        # In units of uint8, so that with 0.5 black and white are exactly -1 and 1.
        middle = torch.tensor([255 * m for m in self.mean], device="cpu")
        spread = torch.tensor([255 * s for s in self.std], device="cpu")
        normalised = pixels.float().sub_(middle).div_(spread)
        return normalised.movedim(-1, -3).contiguous()


def as_rgb(item: Any) -> Image.Image:
    """An image as 8-bit RGB; transparent pixels are shown on white.

    Args:
        item: see `ImageInput`.
    Raises:
        TypeError: not an image.
        ValueError: an image that cannot be read, or whose range is not fixed.
    """
    if isinstance(item, str | Path):
        try:
            with Image.open(item) as image:
                return _flattened(ImageOps.exif_transpose(image))
        except (UnidentifiedImageError, SyntaxError, EOFError) as error:
            raise ValueError(f"ViT: {item} is not an image that can be read") from error
    if isinstance(item, Image.Image):
        return _flattened(item)
    if isinstance(item, np.ndarray | Tensor):
        return _flattened(Image.fromarray(_to_uint8(item)))
    raise TypeError(
        f"ViT: image is a {type(item).__name__}; expected a path, PIL image, array or tensor"
    )


def _flattened(image: Image.Image) -> Image.Image:
    """8-bit RGB of any 8-bit image."""
    if image.mode[0] in "IF":
        raise ValueError(
            f"ViT: image mode is {image.mode}, whose range is not fixed; "
            "expected 8 bits per channel, read it with mmdlm.media.read_image"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
        layers: keep only the first so many blocks and give their output BEFORE the final norm;
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
        size: int | None = None,
        patch: int | None = None,
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        mlp_ratio: float | None = None,
        act: Literal["gelu", "gelu_tanh"] | None = None,
        stem: Literal["conv", "patch"] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        pretrained: bool = False,
        layers: int | None = None,
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
        self._cut(layers)
        self.size = self.vit.patch_embed.img_size[0]
        self.grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)
        self.dim = self.vit.embed_dim
        published = getattr(self.vit, "pretrained_cfg", {}) if name else {}
        half = (0.5, 0.5, 0.5)
        self.preprocess = ImageInput(
            self.size, mean or published.get("mean") or half, std or published.get("std") or half
        )

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
        tokens = self.vit.forward_features(images.to(weight.device, weight.dtype))
        tokens = tokens[:, self.vit.num_prefix_tokens :]  # [B N E]
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Features(tokens, mask, self.grid)

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
        raise ValueError("ViT: stem='conv' with a name; a named model keeps its own patch cut")
    sizes = {TIMM[option]: value for option, value in given.items()}
    vit = timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="", **sizes)
    missing = [part for part in ("blocks", "patch_embed", "norm") if not hasattr(vit, part)]
    if missing:
        raise ValueError(
            f"ViT: {name} is a {type(vit).__name__} without {', '.join(missing)}; "
            "expected a vision transformer, see timm.list_models('vit*')"
        )
    return vit


def _to_uint8(item: np.ndarray | Tensor) -> np.ndarray:
    """[Y X 3] uint8 from an array in either channel order, uint8 in 0..255 or float in 0..1."""
    array = item.detach().cpu().numpy() if isinstance(item, Tensor) else item
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)  # [Y X C]
    if array.ndim == 3 and array.shape[2] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)  # [Y X C]
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"ViT: image is {list(item.shape)}, expected [Y X 3], [3 Y X] or [Y X] with Y, X > 0"
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f":
        raise ValueError(f"ViT: image dtype is {array.dtype}, expected uint8 or float in 0..1")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise ValueError(
            f"ViT: float image spans {low:g} to {high:g}, expected 0 to 1; divide by 255 first?"
        )
    return np.ascontiguousarray(np.rint(array * 255).astype(np.uint8))
