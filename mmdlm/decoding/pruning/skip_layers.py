"""Let media tokens skip layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from encoders.checks import NonNegativeInt
from mmdlm.decoding.look import Look
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class SkipLayers(Strategy):
    """Media tokens skip layers: there they are neither computed nor attended to.

    They enter the next layer as they left the one before. For models that were made from
    autoregressive ones, whose media tokens carry information in few layers.

    Source: arXiv 2511.15098 names layer skipping for such models; it has no public code, and the
    choice of layers is not given there.

    Args:
        layers: indices of the skipped layers, from 0.
    """

    paper: ClassVar[str] = "visual token redundancy, arXiv 2511.15098"
    requires: ClassVar[frozenset[str]] = frozenset({"one_forward", "plain_cache", "masks"})

    layers: tuple[NonNegativeInt, ...] = (0,)

    def prepare(self, model: MultimodalDLM, columns: slice | None) -> dict[str, object]:
        """Checks the layers.

        Raises:
            ValueError: the model has no such layer.
        """
        depth = len(model.backbone.blocks)
        if not self.layers or max(self.layers) >= depth:
            raise ValueError(
                f"SkipLayers.layers is {list(self.layers)}, expected layers from 0 to {depth - 1}"
            )
        return {}

    def look(self, view: View) -> Look | None:
        """The media are gone in the skipped layers; None for rows without media."""
        media = view.sequence.is_medium & view.sequence.mask
        if view.sequence.media is None or not bool(media.any()):
            return None
        return _Skipping(media, frozenset(self.layers))


class _Skipping(Look):
    """Some positions are gone in some layers.

    Args:
        media: [B L] bool.
        layers: indices.
    """

    def __init__(self, media: Tensor, layers: frozenset[int]) -> None:
        self.media, self.layers = media, layers

    def gone(self, layer: int) -> Tensor | None:
        """See `Look.gone`."""
        return self.media if layer in self.layers else None
