"""Where the random draws of a decode come from: every row has its own stream."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

Source = torch.Generator | Items[torch.Generator] | None
"""One generator for the rows, one per row, or torch's own."""


class Streams:
    """The random streams of rows that were added together; seeded when the first number is drawn.

    Args:
        source: see `Source`; with one generator, row i is seeded by its i-th draw.
        batch: number of rows.
        device: where the streams draw.
    Raises:
        ValueError: there are more or fewer generators than rows.
    """

    def __init__(self, source: Source, batch: int, device: torch.device) -> None:
        if isinstance(source, Items) and len(source) != batch:
            raise ValueError(f"generator: {len(source)} for {batch} rows; give one, or one per row")
        self.source, self.batch, self.device = source, batch, device
        self.made: list[torch.Generator] | None = None

    def __getitem__(self, row: int) -> torch.Generator:
        if self.made is None:
            self.made = streams(self.source, self.batch, self.device)
        return self.made[row]


def streams(source: Source, batch: int, device: torch.device) -> list[torch.Generator]:
    """One random stream per row, each seeded by one draw from the source.

    Args:
        source: see `Source`; with one generator, row i is seeded by its i-th draw.
        batch: number of rows.
        device: where the streams draw.
    """
    if source is None or isinstance(source, torch.Generator):
        place = "cpu" if source is None else source.device
        seeds = torch.randint(2**62, (batch,), generator=source, device=place).tolist()
    else:
        seeds = [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in source]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]
