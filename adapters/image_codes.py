"""Images as token ids: codes of an image tokenizer in a prompt, and those that a model draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from adapters.adapter import Adapter, Embedded
from adapters.codec import Codec
from encoders.checks import AtLeast, AtMost, Checked, Count, CountOrZero
from encoders.features import Features, Prepared

OPEN = -1
"""Entry of a grid of codes that is still to be drawn."""


@dataclass(frozen=True)
class ImageCodes(Codec, Checked):
    """Codec of drawn images: a grid of codes [Y X] as ids, row by row.

    Args:
        first: id of code 0.
        count: number of codes.
        stride: pixels per code on each axis.
        size: width and height in pixels of an image for which none is given.
        begin: ids before the codes, which are given.
        end: ids after the codes, which are given.
        newline: id after each row, which is given; None without.
        before: ids before the text of a prompt.
        after: ids after it. With neither, a text is a user message of the chat template.
        system: system message of a prompt for a new image; None for that of the template.
        edit_system: system message of a prompt that changes an image; None: the model cannot.
        edit_size: side of a square with as many pixels as images to be changed are read with.
    """

    first: CountOrZero
    count: Count
    stride: Annotated[int, AtLeast(1), AtMost(2**10)]
    size: tuple[Count, Count]
    begin: tuple[CountOrZero, ...] = ()
    end: tuple[CountOrZero, ...] = ()
    newline: CountOrZero | None = None
    before: tuple[CountOrZero, ...] = ()
    after: tuple[CountOrZero, ...] = ()
    system: str | None = None
    edit_system: str | None = None
    edit_size: Count | None = None

    @property
    def ids(self) -> range:
        """Ids of codes."""
        return range(self.first, self.first + self.count)

    def grid(self, size: Sequence[int] | None = None) -> tuple[int, int]:
        """Rows and columns of codes of an image.

        Args:
            size: width and height in pixels; None for the usual ones.
        Raises:
            ValueError: a side is not a positive multiple of the stride.
        """
        wide, high = self.size if size is None else size
        if min(wide, high) < 1 or wide % self.stride or high % self.stride:
            raise ValueError(
                f"size is {wide} x {high}, expected positive multiples of {self.stride} pixels"
            )
        return high // self.stride, wide // self.stride

    def encode(self, value: Tensor) -> Tensor:
        """Ids [n] of codes [Y X] int64, with what is before, between and after them.

        Raises:
            ValueError: not such a grid.
        """
        return self.canvas(value, None)

    def canvas(self, codes: Tensor, mask_id: int | None) -> Tensor:
        """Ids [n] of codes [Y X] int64 of which some may be `OPEN`.

        Args:
            codes: codes in [0, count), or `OPEN`.
            mask_id: id at open positions; None: there may be none.
        Raises:
            ValueError: not such a grid.
        """
        least = 0 if mask_id is None else OPEN
        if codes.ndim != 2 or 0 in codes.shape or codes.is_floating_point():
            raise ValueError(f"codes are {list(codes.shape)} {codes.dtype}, expected int64 [Y X]")
        if int(codes.min()) < least or int(codes.max()) >= self.count:
            raise ValueError(
                f"codes span {int(codes.min())} to {int(codes.max())}, expected {least} to "
                f"{self.count - 1}"
            )
        ids = codes.long() + self.first
        if mask_id is not None:
            ids = ids.masked_fill(codes == OPEN, mask_id)
        if self.newline is not None:
            ids = torch.cat([ids, torch.full_like(ids[:, :1], self.newline)], 1)
        return torch.cat([ids.new_tensor(self.begin), ids.flatten(), ids.new_tensor(self.end)])

    def decode(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes [Y X] of ids [n]; `OPEN` where an id is not that of a code.

        Args:
            ids: as `encode` gives them.
            grid: rows and columns; None for the usual ones.
        """
        rows, columns = self.grid() if grid is None else grid
        inner = ids[len(self.begin) : len(ids) - len(self.end)]
        codes = inner.view(rows, columns + (self.newline is not None))[:, :columns] - self.first
        return codes.masked_fill((codes < 0) | (codes >= self.count), OPEN)

    def to_dict(self) -> dict[str, Any]:
        """See `Codec.to_dict`."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """See `Codec.from_dict`."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


class CodeTokens(Adapter):
    """Adapter of an image tokenizer: an image in a prompt is a stretch of token ids, no embeddings.

    Args:
        in_dim: width of the tokenizer's output; its first channel holds the codes.
        out_dim: backbone width, not used.
        first: id of code 0.
        begin: ids before the codes.
        end: ids after the codes.
        newline: id after each row; None without.
    """

    gives_ids: ClassVar[bool] = True

    def __init__(
        self,
        in_dim: Count = 1,
        out_dim: Count = 1,
        first: CountOrZero = 0,
        begin: Sequence[int] = (),
        end: Sequence[int] = (),
        newline: CountOrZero | None = None,
    ) -> None:
        super().__init__(in_dim, out_dim)
        self.first, self.newline = first, newline
        self.begin, self.end = tuple(begin), tuple(end)

    def forward(self, features: Features) -> Features:
        """Ids [B N 1] of codes [B N 1], without the ids around them."""
        tokens = features.tokens[..., :1].long() + self.first
        return Features(tokens, features.mask, features.sizes)

    def embed(self, features: Features, items: Sequence[Prepared]) -> list[Embedded]:
        """Ids int64 [n] of each image, with those before, between and after its codes."""
        found = []
        for row in super().embed(features, items):
            ids = row.tokens[:, 0]
            if self.newline is not None:
                ids = ids.view(row.grid)
                ids = torch.cat([ids, torch.full_like(ids[:, :1], self.newline)], 1).flatten()
            found.append(
                Embedded(torch.cat([ids.new_tensor(self.begin), ids, ids.new_tensor(self.end)]))
            )
        return found
