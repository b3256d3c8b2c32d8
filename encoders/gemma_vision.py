"""Gemma 4's vision tower: images of any aspect ratio within a budget of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from encoders.checks import Checked, Count, Side
from encoders.encoder import Encoder
from encoders.features import Features, Prepared
from encoders.image import as_rgb

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}


@dataclass(frozen=True)
class GemmaInput(Checked):
    """Cuts one image into patches with values in [0, 1]; holds no weights.

    The image is resized (bicubic) to the largest multiples of `patch * pool` pixels that keep its
    ratio and give at most `tokens` tokens.

    Source: huggingface/transformers: models/gemma4/image_processing_pil_gemma4.py.

    Args:
        patch: patch side in pixels.
        pool: patches per side of a token.
        tokens: most tokens of an image.
    """

    patch: Side = 16
    pool: Side = 3
    tokens: Count = 280

    def __call__(self, item: Any) -> Prepared:
        """The patches of one image, row-major.

        Args:
            item: PIL image, array or tensor, see `encoders.image.as_rgb`.
        Returns:
            Patches [N patch*patch*3] float32, the size in pixels, and rows and columns in patches.
        Raises:
            ValueError: not an image, or one so flat that it has more than `tokens` tokens.
        """
        image = as_rgb(item)
        columns, rows = image.size
        height, width = self.resized(rows, columns)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).float() / 255
        patches = rearrange(
            pixels, "(Y p) (X q) C -> (Y X) (p q C)", p=self.patch, q=self.patch
        ).contiguous()
        return Prepared(
            "image", patches, (rows, columns), (height // self.patch, width // self.patch)
        )

    def resized(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns in pixels an image is resized to."""
        unit = self.patch * self.pool
        scale = math.sqrt(self.tokens / (rows * columns)) * unit
        height, width = (int(scale * side // unit) for side in (rows, columns))
        if not height and not width:
            raise ValueError(
                f"GemmaInput: image is {rows} x {columns} pixels, expected a larger one"
            )
        if not height:
            height, width = 1, min(columns // rows, self.tokens)
        elif not width:
            height, width = min(rows // columns, self.tokens), 1
        return height * unit, width * unit


class GemmaVision(Encoder):
    """Encodes images of any size with transformers' `Gemma4VisionModel`.

    Args:
        config: settings of transformers' `Gemma4VisionConfig`.
        tokens: see `GemmaInput`.
    """

    kind = "image"

    KEYS: ClassVar[dict[str, str | tuple[str, ...]]] = {
        f"tower.{name}": name
        for name in (
            "patch_embedder.input_proj.weight",
            "patch_embedder.position_embedding_table",
            "std_bias",
            "std_scale",
            *(
                f"encoder.layers.{{i}}.{norm}.weight"
                for norm in (
                    "input_layernorm",
                    "post_attention_layernorm",
                    "pre_feedforward_layernorm",
                    "post_feedforward_layernorm",
                    "self_attn.q_norm",
                    "self_attn.k_norm",
                )
            ),
            *(
                f"encoder.layers.{{i}}.{layer}_proj.{part}"
                for layer in (
                    *(f"self_attn.{each}" for each in ("q", "k", "v", "o")),
                    *(f"mlp.{each}" for each in ("gate", "up", "down")),
                )
                for part in ("linear.weight", "input_min", "input_max", "output_min", "output_max")
            ),
        )
    }

    def __init__(self, config: Mapping[str, Any], tokens: Count = 280) -> None:
        super().__init__()
        from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
        from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

        made = Gemma4VisionConfig(**{k: v for k, v in config.items() if k != "model_type"})
        self.preprocess = GemmaInput(made.patch_size, made.pooling_kernel_size, tokens)
        self.dim = made.hidden_size
        self.tower = Gemma4VisionModel(made)

    def forward(self, items: Sequence[Prepared]) -> Features:
        """One token per pool x pool patches, row-major: tokens [B N E], padded at the end.

        Args:
            items: images as `preprocess` gives them, of any sizes.
        Raises:
            ValueError: no images, or one that another preprocessing made.
        """
        if not items:
            raise ValueError("GemmaVision: no images; pass at least one preprocessed image")
        weight = next(self.tower.parameters())
        size, pool = 3 * self.preprocess.patch**2, self.preprocess.pool
        for index, item in enumerate(items):
            grid = item.grid
            fits = len(grid) == 2 and grid[0] % pool == 0 == grid[1] % pool
            if not fits or item.tensor.shape != (math.prod(grid), size):
                raise ValueError(
                    f"GemmaVision: image {index} has patches {list(item.tensor.shape)} on the grid "
                    f"{list(grid)}; expected [N {size}] on a grid of rows and columns; use "
                    "encoder.prepare"
                )
        pixels = pad_sequence([i.tensor.to(weight.device) for i in items], batch_first=True)
        places = [_places(item.grid) for item in items]
        at = pad_sequence(places, batch_first=True, padding_value=-1).to(weight.device)
        found = self.tower(pixels.to(weight.dtype), at).last_hidden_state  # [sum of tokens E]
        counts = torch.tensor([len(item.tensor) for item in items]) // pool**2
        tokens = pad_sequence(found.split(counts.tolist()), batch_first=True)
        mask = torch.arange(tokens.shape[1]) < counts[:, None]
        sizes = tuple((y // pool, x // pool) for y, x in (item.grid for item in items))
        return Features(tokens, mask.to(tokens.device), sizes)

    @classmethod
    def tiny(cls) -> Self:
        """One block of width 16, at most 12 tokens."""
        return cls(SMALL, tokens=12)

    @staticmethod
    def example(seed: int = 0) -> np.ndarray:
        """A random uint8 image of 30 to 60 pixels a side."""
        rng = np.random.default_rng(seed)
        rows, columns = rng.integers(30, 61, 2)
        return rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def _places(grid: tuple[int, ...]) -> Tensor:
    """[N 2] column and row of each patch, row-major."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([columns, rows], -1).flatten(0, 1)
