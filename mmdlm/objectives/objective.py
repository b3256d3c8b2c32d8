"""The base of every training objective."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from mmdlm.layout import Sequence
    from mmdlm.model import MultimodalDLM
    from mmdlm.objectives.packing import Packing


class Losses(NamedTuple):
    """A loss as sum and count, both to be summed over the global batch before the division.

    Args:
        sum: scalar with gradient.
        count: scalar, what the sum is divided by; 0 makes the loss 0.
        logs: name to (sum, count), for metrics averaged the same way.
        extra: further losses as (sum, count, weight), each divided by its own count.
    """

    sum: Tensor
    count: Tensor
    logs: dict[str, tuple[Tensor, Tensor]]
    extra: tuple[tuple[Tensor, Tensor, float], ...] = ()

    @property
    def counts(self) -> tuple[Tensor, ...]:
        """The count of the loss, then that of each extra loss."""
        return (self.count, *(count for _, count, _ in self.extra))

    def mean(self, counts: Items[Tensor] | None = None) -> Tensor:
        """The weighted sum of all sum / count.

        Args:
            counts: `counts` summed over all processes; None for those of this process.
        """
        terms = ((self.sum, 1.0), *((total, weight) for total, _, weight in self.extra))
        counts = self.counts if counts is None else counts
        return sum(
            weight * total / count.clamp(min=1)
            for (total, weight), count in zip(terms, counts, strict=True)
        )


@dataclass(frozen=True)
class Batch:
    """Rows of one data set, ready for the model.

    Args:
        sequence: prompts with clean answers.
        seeds: [B] int64, the seed of each row's noise; of each conversation's in a packed batch,
            as are `phase` and `groups`.
        phase: [B] float64 in [0, 1): a draw shared by the global batch plus the row's place in it,
            so that noise levels are random but evenly spread.
        groups: group of each row, for metrics.
        media: by modality, the embeddings [N D] of each sample's media.
        names: per sample, token ids of what its media show, see `mmdlm.data.collate.Collated`;
            empty if unknown.
        packing: where the conversations of a packed batch are; None if every row is one.
    """

    sequence: Sequence
    seeds: Tensor
    phase: Tensor
    groups: tuple[str, ...] = ()
    media: dict[str, list[Tensor]] = field(default_factory=dict)
    names: list[Tensor | list[Tensor]] = field(default_factory=list)
    packing: Packing | None = None

    @property
    def apart(self) -> Batch:
        """A packed batch with one conversation per row, without media: for noise, not the model."""
        return replace(self, sequence=self.packing.split(self.sequence), packing=None)


class Objective:
    """Computes the loss of a batch; training calls only `step`."""

    def step(self, model: MultimodalDLM, batch: Batch) -> Losses:
        """Sum and count of the loss; random numbers come from the seeds of the batch."""
        raise TypeError(f"{type(self).__name__} does not define step(model, batch)")
