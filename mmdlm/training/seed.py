"""The seed of a run."""

from __future__ import annotations

import os


def given_or_global(seed: int | None) -> int:
    """A seed, or that of `lightning.seed_everything` (0 before it was called) for None."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
