"""Packed batches: several conversations in a batch row, with the noise that each has alone."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mmdlm.layout import Sequence
from mmdlm.objectives.noise import Noise


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a packed batch are when every conversation has a row.

    Args:
        apart: [N W], the layout of the batch with one conversation per row; without media.
        place: [B L] int64, index of each token of the packed batch in `apart`, flattened; -1 at
            padding.
    """

    apart: Sequence
    place: Tensor

    def split(self, sequence: Sequence) -> Sequence:
        """The layout with one conversation per row, with tokens and padding of the packed batch.

        Args:
            sequence: [B L] the packed batch, in which tokens may have become padding.
        """
        real = self.place >= 0
        at, changed = self.place[real], {}
        for name in ("tokens", "mask"):
            whole = getattr(self.apart, name).flatten().clone()
            whole[at] = getattr(sequence, name)[real]
            changed[name] = whole.view_as(self.apart.mask)
        return replace(self.apart, **changed)

    def join(self, noise: Noise) -> Noise:
        """Noise [N W] of the conversations as noise [B L] of the packed batch."""
        real = self.place >= 0
        at = self.place.clamp(min=0)
        values = {}
        for name in (f.name for f in fields(noise)):
            value = getattr(noise, name)
            if value is not None:
                value = value.flatten()[at]
                # Padding has probability 1, so that no weight 1 / p is infinite.
                fill = False if value.dtype == torch.bool else 1
                values[name] = value.masked_fill(~real, fill)
        width = self.apart.mask.shape[1]
        row = (at // width).masked_fill(~real, len(self.apart.mask))
        return replace(noise, **values, row=row)


def bins(sizes: list[int], limit: int) -> list[list[int]]:
    """Conversations of each packed row: first fit, longest first.

    Source: first-fit decreasing, which needs at most 11/9 of the fewest rows (Johnson, 1973).

    Args:
        sizes: tokens of each conversation.
        limit: tokens of a row; a longer conversation has a row alone.
    Returns:
        indices of `sizes`, each once.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[index]
        row = next((r for r, free in enumerate(room) if free >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(limit)
        rows[row].append(index)
        room[row] -= size
    return rows
