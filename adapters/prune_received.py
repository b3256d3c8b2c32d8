"""Keep the tokens that receive the most attention inside the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adapters.pruner import Pruner, Seen


@dataclass(frozen=True)
class Received(Pruner):
    """Keeps the tokens to which the encoder's other tokens attend most.

    The input-side counterpart of FastV (`mmdlm.decoding.pruning.prune_media.PruneMedia`), which
    ranks by attention inside the language model; also the first half of `VisionZip`.
    """

    needs_attention: ClassVar[bool] = True

    def select(self, seen: Seen) -> Tensor:
        """See `Pruner.select`."""
        return seen.received.topk(self.count(len(seen.received))).indices
