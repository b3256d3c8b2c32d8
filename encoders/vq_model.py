"""The VQModel of diffusers: each latent is replaced by the nearest entry of a codebook.

Source: huggingface/diffusers: src/diffusers/models/autoencoders/vq_model.py, vae.py. Lumina-DiMOO
and aMUSEd publish one in their sub-folder `vqvae`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from encoders.checks import Count, Side
from encoders.encoder import Encoder
from encoders.vq import CodeInput, ImageTokenizer
from encoders.vq_layers import PixelDecoder, PixelEncoder, block_keys, level_keys

SHORTCUT = "conv_shortcut"


def _side(name: str, list_name: str, scale: str) -> dict[str, str]:
    """Names of encoder or decoder."""
    keys = level_keys(f"{name}.", f"{name}.{list_name}.{{i}}", "resnets", scale, SHORTCUT)
    middle = f"{name}.mid_block"
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"}
    for part in ("weight", "bias"):
        for index, ours in enumerate(("first", "second")):
            keys |= block_keys(f"{name}.middle.{ours}", f"{middle}.resnets.{index}", SHORTCUT, part)
        for ours, theirs in attention.items():
            published = f"{middle}.attentions.0.{theirs}.{part}"
            keys[f"{name}.middle.attention.{ours}.{part}"] = published
        for ours in ("conv_in", "norm_out", "conv_out"):
            theirs = "conv_norm_out" if ours == "norm_out" else ours
            keys[f"{name}.{ours}.{part}"] = f"{name}.{theirs}.{part}"
    return keys


class VQModel(ImageTokenizer, Encoder):
    """Convolutional encoder and decoder around a codebook.

    Args:
        widths: channels of each level, from the highest resolution on.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        latent: channels of the latents.
        count: codes.
        code_dim: channels of a codebook entry; None: as the latents.
        groups: groups of the norms.
        attention: attention at the lowest resolution.
        size: side at which images are read, in pixels, see `encoders.vq.CodeInput`.
        crop: see there.
    """

    KEYS: ClassVar[dict[str, Any]] = {
        **_side("encoder", "down_blocks", "downsamplers.0.conv"),
        **_side("decoder", "up_blocks", "upsamplers.0.conv"),
        **{f"quant.{part}": f"quant_conv.{part}" for part in ("weight", "bias")},
        **{f"unquant.{part}": f"post_quant_conv.{part}" for part in ("weight", "bias")},
        "codebook.weight": "quantize.embedding.weight",
    }
    low = 0.0

    def __init__(
        self,
        widths: Sequence[int] = (128, 256, 256, 512, 768),
        blocks: Count = 2,
        latent: Count = 64,
        count: Count = 8192,
        code_dim: Count | None = None,
        groups: Count = 32,
        attention: bool = False,
        size: Side = 1024,
        crop: Literal["square", "squash", "best"] = "best",
    ) -> None:
        super().__init__()
        depth, kind = len(widths), "linear" if attention else None
        self.count, self.stride = count, 2 ** (depth - 1)
        code_dim = latent if code_dim is None else code_dim
        self.encoder = PixelEncoder(widths, [blocks] * depth, latent, groups, kind)
        self.decoder = PixelDecoder(
            widths, [blocks + 1] * depth, latent, groups, kind, reverse=False
        )
        self.quant, self.unquant = nn.Conv2d(latent, code_dim, 1), nn.Conv2d(code_dim, latent, 1)
        self.codebook = nn.Embedding(count, code_dim)
        self.preprocess = CodeInput(size, crop, self.low)

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes [B Y/s X/s] int64 of pixels [B 3 Y X]."""
        latents = self.quant(self.encoder(pixels)).movedim(1, -1)  # [B Y/s X/s C]
        rows = latents.flatten(0, 2)
        return torch.cdist(rows, self.codebook.weight).argmin(1).view(latents.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B 3 Y X] of codes [B Y/s X/s]."""
        return self.decoder(self.unquant(self.codebook(codes).movedim(-1, 1)))

    @classmethod
    def tiny(cls) -> Self:
        """16 codes of 4x4 pixels, for tests."""
        return cls((32, 32, 32), 1, 4, 16, attention=True, size=64)

    @staticmethod
    def example(seed: int = 0) -> Any:
        """A random image."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (32, 48, 3), generator=generator, dtype=torch.uint8)
