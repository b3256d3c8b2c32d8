"""MAGVIT-v2 image tokenizer: one bit of the code per latent channel (lookup-free quantization).

Source: Gen-Verse/MMaDA: models/modeling_magvitv2.py, models/common_modules.py; hub
showlab/magvitv2.
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

GROUPS = 32
SHORTCUT = "nin_shortcut"


def _side(name: str, list_name: str, scale: str) -> dict[str, str]:
    """Names of encoder or decoder."""
    keys = level_keys(f"{name}.", f"{name}.{list_name}.{{i}}", "block", f"{scale}.conv", SHORTCUT)
    for part in ("weight", "bias"):
        for ours, theirs in (("first", "block_1"), ("second", "block_2")):
            keys |= block_keys(f"{name}.middle.{ours}", f"{name}.mid.{theirs}", SHORTCUT, part)
        for ours in ("norm", "q", "k", "v", "proj"):
            theirs = "proj_out" if ours == "proj" else ours
            keys[f"{name}.middle.attention.{ours}.{part}"] = f"{name}.mid.attn_1.{theirs}.{part}"
        for same in ("conv_in", "norm_out", "conv_out"):
            keys[f"{name}.{same}.{part}"] = f"{name}.{same}.{part}"
    return keys


class MagvitV2(ImageTokenizer, Encoder):
    """MAGVIT-v2; channel c of a latent gives bit `bits - 1 - c` of the code, 1 if it is above 0.

    Args:
        width: channels per unit of the multipliers.
        bits: latent channels; there are 2 ** bits codes.
        down: multipliers of the encoder's levels, from the highest resolution on.
        down_blocks: residual blocks of each of them.
        up: multipliers of the decoder's levels, in the same order.
        up_blocks: residual blocks of each of them.
        size: side at which images are read, in pixels.
        crop: see `encoders.vq.CodeInput`.
    """

    KEYS: ClassVar[dict[str, Any]] = {
        **_side("encoder", "down", "downsample"),
        **_side("decoder", "up", "upsample"),
        **{f"quant.{part}": f"encoder.quant_conv.{part}" for part in ("weight", "bias")},
        **{f"unquant.{part}": f"decoder.post_quant_conv.{part}" for part in ("weight", "bias")},
    }
    low = -1.0

    def __init__(
        self,
        width: Count = 128,
        bits: Count = 13,
        down: Sequence[int] = (1, 2, 2, 4, 4),
        down_blocks: Sequence[int] = (4, 3, 4, 3, 4),
        up: Sequence[int] = (1, 1, 2, 2, 4),
        up_blocks: Sequence[int] = (4, 4, 3, 4, 3),
        size: Side = 512,
        crop: Literal["square", "squash"] = "square",
    ) -> None:
        super().__init__()
        self.bits, self.count, self.stride = bits, 2**bits, 2 ** (len(down) - 1)
        wide, narrow = [width * each for each in down], [width * each for each in up]
        self.encoder = PixelEncoder(wide, down_blocks, bits, GROUPS, "convolution")
        self.decoder = PixelDecoder(narrow, up_blocks, bits, GROUPS, "convolution", reverse=True)
        self.quant, self.unquant = nn.Conv2d(bits, bits, 1), nn.Conv2d(bits, bits, 1)
        self.preprocess = CodeInput(size, crop, self.low)

    def latents(self, pixels: Tensor) -> Tensor:
        """[B bits Y/s X/s] of pixels [B 3 Y X], before quantization."""
        return self.quant(self.encoder(pixels))

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes [B Y/s X/s] int64 of pixels [B 3 Y X]."""
        is_set = (self.latents(pixels) > 0).long()
        return (is_set << self._places(pixels.device)).sum(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B 3 Y X] of codes [B Y/s X/s]."""
        is_set = (codes[:, None] >> self._places(codes.device)) & 1  # [B bits Y/s X/s]
        return self.decoder(self.unquant((2 * is_set - 1).to(self.unquant.weight.dtype)))

    def _places(self, device: torch.device) -> Tensor:
        """[bits 1 1] place of each channel's bit."""
        return torch.arange(self.bits - 1, -1, -1, device=device)[:, None, None]

    @classmethod
    def tiny(cls) -> Self:
        """64 codes of 4x4 pixels, for tests."""
        sizes = {"down": (1, 1, 1), "down_blocks": (1, 1, 1)}
        return cls(32, 6, **sizes, up=(1, 1, 1), up_blocks=(1, 1, 1), size=16)

    @staticmethod
    def example(seed: int = 0) -> Any:
        """A random image."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (16, 24, 3), generator=generator, dtype=torch.uint8)
