"""The contract between encoders, adapters and the model.

Shape letters used throughout: B batch, L sequence, V vocabulary, D backbone width, N modality
tokens, E encoder width, Y X image rows/columns, C channels, T audio samples or frames, S state
size, K actions per chunk, A action size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Size = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """One preprocessed item: what an encoder takes, on the CPU and without weights.

    Args:
        kind: modality, "image", "audio" or "state".
        tensor: pixels [3 Y X], views of one image [V 3 Y X], patches [N C], log-mel frames
            [mels T] or a state [S]; float.
        size: rows and columns of the original image in pixels; () otherwise.
        grid: patches per axis where the item decides it (native resolution), or tiles per axis of
            an image in several views; () otherwise.
    """

    kind: str
    tensor: Tensor
    size: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()

    @cached_property
    def digest(self) -> Hashable:
        """Cache key by content: equal for items that an encoder turns into equal tokens."""
        data = self.tensor.contiguous().view(torch.uint8).numpy()
        content = hashlib.blake2b(data, digest_size=16).digest()
        return self.kind, content, tuple(self.tensor.shape), self.size, self.grid


@dataclass(frozen=True)
class Sparse:
    """Embeddings at some of the places of a medium, whose rotary positions they keep.

    Args:
        tokens: [K D] float.
        places: [K] int64 ascending, below `span`.
        span: positions that the medium takes up.
    """

    tokens: Tensor
    places: Tensor
    span: int

    def __len__(self) -> int:
        """K."""
        return len(self.tokens)


@dataclass(frozen=True)
class Features:
    """Tokens of one modality for a batch.

    Args:
        tokens: [B N E] float.
        mask: [B N] bool, True for real tokens; the values of other tokens are never used.
        sizes: rows and columns of each item whose tokens are a row-major grid; one pair stands for
            all items. None without grids.
        hidden: [B M E] each, hidden states of chosen layers for adapters that use several.
    """

    tokens: Tensor
    mask: Tensor
    sizes: tuple[Size, ...] | Size | None = None
    hidden: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.mask.shape != self.tokens.shape[:2]:
            raise ValueError(
                f"Features: tokens {list(self.tokens.shape)} and mask {list(self.mask.shape)}; "
                "expected [B N E] and [B N]"
            )
        if self.sizes is None:
            return
        batch, count = self.mask.shape
        sizes = self.sizes
        if len(sizes) == 2 and isinstance(sizes[0], int):
            sizes = (sizes,) * batch
        object.__setattr__(self, "sizes", tuple(sizes))
        if len(sizes) != batch:
            raise ValueError(f"Features: {len(sizes)} sizes for {batch} items")
        most = max((rows * columns for rows, columns in sizes), default=count)
        if most != count:
            raise ValueError(f"Features: sizes {sizes} do not hold {count} tokens")

    @property
    def grid(self) -> Size | None:
        """Rows and columns that all items have in common; None without."""
        sizes = set(self.sizes or ())
        return sizes.pop() if len(sizes) == 1 else None
