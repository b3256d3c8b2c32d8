"""Qwen2-VL's vision tower: images at native resolution, one token per 2x2 patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.checks import Checked, Count, Deviation, Factor, Mean, Side
from encoders.encoder import Encoder
from encoders.features import Features, Prepared
from encoders.image import as_rgb
from encoders.qwen_attention import angles_of, attend, merged, note_units

NORM_EPS = 1e-6
FLATTEST = 200
"""Largest ratio of the sides of an image."""


@dataclass(frozen=True)
class PatchInput(Checked):
    """Cuts one image of any size into normalised patches; holds no weights.

    The image is resized (bicubic) to multiples of `patch * merge` pixels near its original size. A
    still image is repeated to `frames` frames. Patches are ordered in groups of merge x merge, and
    groups in row-major order; the values of a patch are ordered channel, frame, row, column.

    Source: DreamLM/Dream-VLX: vl/train/dreamvl/image_processing_dreamvl.py, after Qwen2-VL.

    Args:
        patch: patch side in pixels.
        merge: patches per side of a token.
        frames: frames per patch.
        min_pixels: smaller images are enlarged to about this many pixels.
        max_pixels: larger images are reduced to at most this many pixels.
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, divides after `mean`.
        square: first pad the image to a square with the mean colour, the image in the middle.
    """

    patch: Side = 14
    merge: Side = 2
    frames: Side = 2
    min_pixels: Count = 56 * 56
    max_pixels: Count = 4096 * 784
    mean: tuple[Mean, Mean, Mean] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[Deviation, Deviation, Deviation] = (0.26862954, 0.26130258, 0.27577711)
    square: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.patch * self.merge) ** 2 <= self.max_pixels >= self.min_pixels:
            raise ValueError(
                f"PatchInput: min_pixels={self.min_pixels}, max_pixels={self.max_pixels}; expected "
                f"min_pixels <= max_pixels, and max_pixels of one token "
                f"({(self.patch * self.merge) ** 2}) or more"
            )

    def __call__(self, item: Any) -> Prepared:
        """The patches of one image.

        Args:
            item: PIL image, array or tensor, see `encoders.image.as_rgb`.
        Returns:
            Patches [N C*frames*patch*patch] float32, the size in pixels, and the grid in patches:
            (1, rows, columns).
        Raises:
            ValueError: not an image, or one side is over 200 times the other.
        """
        image = as_rgb(item)
        columns, rows = image.size
        if self.square:
            image = self._padded(image)
        height, width = self.resized(*reversed(image.size))
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        mean, std = (torch.tensor(values, device="cpu") for values in (self.mean, self.std))
        pixels = (torch.from_numpy(np.array(image)).float() / 255 - mean) / std  # [Y X C]
        patches = rearrange(
            pixels.expand(self.frames, *pixels.shape),
            "T (Y a p) (X b q) C -> (Y X a b) (C T p q)",
            a=self.merge,
            b=self.merge,
            p=self.patch,
            q=self.patch,
        )
        grid = (1, height // self.patch, width // self.patch)
        return Prepared("image", patches.contiguous(), (rows, columns), grid)

    def _padded(self, image: Image.Image) -> Image.Image:
        """The image in the middle of a square of the mean colour."""
        side = max(image.size)
        padded = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in self.mean))
        padded.paste(image, tuple((side - each) // 2 for each in image.size))
        return padded

    def resized(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns in pixels an image is resized to, multiples of `patch * merge`."""
        unit, original = self.patch * self.merge, f"{rows} x {columns}"
        short = min(rows, columns)
        if short < unit:  # enlarged until the short side fills one token
            rows, columns = round(rows / short * unit), round(columns / short * unit)
        elif max(rows, columns) > FLATTEST * short:
            raise ValueError(
                f"PatchInput: image is {original} pixels; expected sides of a ratio of at most "
                f"{FLATTEST}, crop it"
            )
        height, width = round(rows / unit) * unit, round(columns / unit) * unit
        if height * width > self.max_pixels:
            scale = math.sqrt(rows * columns / self.max_pixels)
            height, width = (math.floor(side / scale / unit) * unit for side in (rows, columns))
        elif height * width < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (rows * columns))
            height, width = (math.ceil(side * scale / unit) * unit for side in (rows, columns))
        if not height * width:
            raise ValueError(
                f"PatchInput: image is {original} pixels, too flat for max_pixels="
                f"{self.max_pixels}; crop it or raise max_pixels"
            )
        return height, width


class QwenVision(Encoder):
    """Encodes images of any size, each attending to itself only.

    Blocks with 2-D rotary positions run over patches; then each merge x merge neighbours become
    one token. transformers has the same network
    (`transformers.models.qwen2_vl.Qwen2VisionTransformerPretrainedModel`) and is the oracle of the
    tests. This one starts without its import, which takes three times as long as torch's, and can
    be built on the meta device, where the other loses its table of rotary frequencies.

    Source: Qwen2-VL (arXiv 2409.12191); DreamLM/Dream-VLX: vl/train/dreamvl/modeling_dreamvl.py.

    Args:
        dim: width E of the tokens.
        width: width of the blocks.
        depth: number of blocks.
        heads: attention heads; the width of each is a multiple of four.
        mlp_ratio: width of each block's hidden layer over `width`.
        patch: patch side in pixels.
        merge: patches per side of a token.
        frames: frames per patch.
        min_pixels: see `PatchInput`.
        max_pixels: see `PatchInput`.
        mean: see `PatchInput`.
        std: see `PatchInput`.
    """

    kind = "image"

    KEYS: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "patches.weight": "patch_embed.proj.weight",
        **{
            f"blocks.{{i}}.{ours}.{part}": f"blocks.{{i}}.{published}.{part}"
            for ours, published in (
                ("norm1", "norm1"),
                ("norm2", "norm2"),
                ("qkv", "attn.qkv"),
                ("out", "attn.proj"),
                ("up", "mlp.fc1"),
                ("down", "mlp.fc2"),
            )
            for part in ("weight", "bias")
        },
        **{
            f"{ours}.{part}": f"merger.{published}.{part}"
            for ours, published in (("norm", "ln_q"), ("up", "mlp.0"), ("down", "mlp.2"))
            for part in ("weight", "bias")
        },
    }

    def __init__(
        self,
        dim: Count = 3584,
        *,
        width: Count = 1280,
        depth: Count = 32,
        heads: Count = 16,
        mlp_ratio: Factor = 4,
        patch: int = 14,
        merge: int = 2,
        frames: int = 2,
        min_pixels: int = PatchInput.min_pixels,
        max_pixels: int = PatchInput.max_pixels,
        mean: tuple[float, float, float] = PatchInput.mean,
        std: tuple[float, float, float] = PatchInput.std,
    ) -> None:
        super().__init__()
        if width % heads or width // heads % 4:
            raise ValueError(
                f"QwenVision: width={width} over heads={heads}; expected heads whose width is a "
                "multiple of 4, for rotary positions of rows and columns"
            )
        self.dim, self.heads, self.merge = dim, heads, merge
        self.preprocess = PatchInput(patch, merge, frames, min_pixels, max_pixels, mean, std)
        cut = (frames, patch, patch)
        self.patches = nn.Conv3d(3, width, cut, cut, bias=False)
        self.blocks = nn.ModuleList(
            _Block(width, heads, int(width * mlp_ratio)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.up = nn.Linear(width * merge**2, width * merge**2)
        self.down = nn.Linear(width * merge**2, dim)

    def forward(self, items: Sequence[Prepared]) -> Features:
        """One token per merge x merge patches, row-major: tokens [B N E], padded at the end.

        Args:
            items: images as `preprocess` gives them, of any sizes.
        Raises:
            ValueError: no images, or one that another preprocessing made.
        """
        weight = self.patches.weight.flatten(1)  # [width C*T*P*P]
        check_items("QwenVision", items, weight.shape[1], self.merge)
        patches = torch.cat([item.tensor.to(weight.device, weight.dtype) for item in items])
        quarter = len(weight) // self.heads // 4
        angles = torch.cat([angles_of(item.grid, self.merge, quarter) for item in items])
        angles = angles.to(weight.device)
        x = F.linear(patches, weight)  # [sum of N width]
        lengths = [len(item.tensor) for item in items]
        turn = angles.cos(), angles.sin()
        for block in self.blocks[:-1]:
            x = block(x, turn, lengths)
        note_units(self, self.blocks[-1], x, turn, lengths, items)
        x = self.blocks[-1](x, turn, lengths)
        x = rearrange(self.norm(x), "(n m) width -> n (m width)", m=self.merge**2)
        return merged(self.down(F.gelu(self.up(x))), items, self.merge)

    @property
    def records_attention(self) -> bool:
        """See `Encoder.records_attention`: that of the last block, see `note_units`."""
        return True

    @classmethod
    def tiny(cls) -> Self:
        """One block of width 16; tokens of width 32."""
        return cls(32, width=16, depth=1, heads=2, mlp_ratio=2)

    @staticmethod
    def example(seed: int = 0) -> np.ndarray:
        """A random uint8 image of 60 to 120 pixels a side."""
        rng = np.random.default_rng(seed)
        rows, columns = rng.integers(60, 121, 2)
        return rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)


class _Block(nn.Module):
    """Attention within each image, then a hidden layer with quick GELU."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        """Patches [n width] of images that have `lengths` patches each."""
        x = x + self.out(self._attend(self.qkv(self.norm1(x)), turn, lengths))
        hidden = self.up(self.norm2(x))
        return x + self.down(hidden * torch.sigmoid(1.702 * hidden))

    def _attend(self, qkv: Tensor, turn: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        return attend(qkv, turn, lengths, self.heads)


def check_items(name: str, items: Sequence[Prepared], size: int, merge: int) -> None:
    """Checks that there are images, whose patches fit a tower and their grid.

    Args:
        name: of the tower.
        items: images as `PatchInput` gives them.
        size: numbers in a patch.
        merge: patches per side of a token.

    Raises:
        ValueError: there are none, or another preprocessing made them.
    """
    if not items:
        raise ValueError(f"{name}: no images; pass at least one preprocessed image")
    for index, item in enumerate(items):
        grid = item.grid
        fits = len(grid) == 3 and grid[1] % merge == 0 == grid[2] % merge
        if not fits or item.tensor.shape != (math.prod(grid), size) or not math.prod(grid):
            raise ValueError(
                f"{name}: image {index} has patches {list(item.tensor.shape)} on the grid "
                f"{list(grid)}; expected [N {size}] on a grid (frames, rows, columns) of N patches "
                f"whose rows and columns are multiples of {merge}; use encoder.prepare"
            )
