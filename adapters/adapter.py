"""Base class of adapters, which map encoder features to the backbone's width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from encoders.arguments import Recorded
from encoders.checks import Count
from encoders.features import Features, Prepared, Size


class Embedded(NamedTuple):
    """Embeddings of one item.

    Args:
        tokens: [N D] embeddings.
        grid: rows and columns if the tokens are a row-major grid, else None.
    """

    tokens: Tensor
    grid: Size | None = None


class Adapter(Recorded, nn.Module):
    """Base class: projects, pools, prunes or merges features.

    Args:
        in_dim: encoder width E.
        out_dim: backbone width D.

    Attributes:
        gives_ids: `embed` gives token ids, not embeddings.
        needs_grid: where a token stands among the others matters; False where `forward` maps each
            token by itself.
    """

    gives_ids: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True

    def __init__(self, in_dim: Count, out_dim: Count) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = out_dim

    def forward(self, features: Features) -> Features:
        """Features of width `out_dim`.

        Args:
            features: output of the encoder, tokens [B N E].
        """
        raise TypeError(f"{type(self).__name__} does not define forward(features)")

    def embed(self, features: Features, items: Sequence[Prepared]) -> list[Embedded]:
        """Embeddings of each item; by default one row of `forward` each, without padding.

        Override it to merge the views of an item or to append vectors.

        Args:
            features: output of the encoder for these items.
            items: preprocessed items, with their original sizes and views.
        Raises:
            ValueError: the encoder returned several rows per item, which this adapter cannot merge.
        """
        if len(features.tokens) != len(items):
            raise ValueError(
                f"{type(self).__name__}: {len(features.tokens)} rows of features for {len(items)} "
                "items; use an adapter that merges the views of an image"
            )
        return rows_of(self(features))

    def carry(self, features: Features, items: Sequence[Prepared]) -> list[Tensor]:
        """Values of the encoder's tokens at the tokens that `embed` makes of them.

        They are pooled and merged as the tokens are, but not projected; zero where a token is a
        learnt vector. For pruners, which rank embeddings by what the encoder says of its tokens.

        Args:
            features: "tokens" [B N C] are the values, on the grid of the encoder's output.
            items: see `embed`.
        Raises:
            ValueError: the adapter cannot say which tokens its embeddings come from.
        """
        if not self.needs_grid:
            return [row.tokens for row in rows_of(features)]
        raise ValueError(
            f"{type(self).__name__} mixes tokens, so that its embeddings cannot be ranked by the "
            "encoder's attention; use divprune, pooling or uniform"
        )


def rows_of(out: Features) -> list[Embedded]:
    """The real tokens of each row.

    Args:
        out: tokens [B N D].
    """
    sizes = out.sizes or (None,) * len(out.tokens)
    return [
        Embedded(row[keep], size)
        for row, keep, size in zip(out.tokens, out.mask, sizes, strict=True)
    ]
