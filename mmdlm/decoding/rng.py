"""Where the random draws of a decode come from."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

Source = torch.Generator | Items[torch.Generator] | None
"""One generator for the batch, one per row, or torch's own."""


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
