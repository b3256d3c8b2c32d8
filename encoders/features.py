"""The one contract between encoders, adapters and the model.

Shape letters used throughout: B batch, L sequence, V vocabulary, D backbone width, N modality
tokens, E encoder width, Y X image rows/columns, C channels, T audio samples or frames, S state
size, K actions per chunk, A action size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Tokens of one modality for a batch.

    Args:
        tokens: [B N E] float.
        mask: [B N] bool, True where the token is real; what stands at False is never read.
        grid: rows and columns when the tokens are a row-major picture, else None.
    """

    tokens: Tensor
    mask: Tensor
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.mask.shape != self.tokens.shape[:2]:
            raise ValueError(
                f"Features: tokens {list(self.tokens.shape)} and mask {list(self.mask.shape)}; "
                "expected [B N E] and [B N]"
            )
        if self.grid is not None and self.grid[0] * self.grid[1] != self.tokens.shape[1]:
            raise ValueError(f"Features: grid {self.grid} does not hold {self.tokens.shape[1]}")
