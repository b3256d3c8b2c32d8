"""Held-out shares: disjoint, complete and always the same."""

from __future__ import annotations

import numpy as np
import pytest

from mmdlm.data.dataset import Dataset
from mmdlm.data.split import Split


class Numbers(Dataset):
    """Its samples are their own indices."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, rng: np.random.Generator) -> int:
        return index


def rows(count: int, part: str, share: float = 0.1) -> list[int]:
    data = Split(Numbers(count), part, share)
    return [data.sample(i, np.random.default_rng(0)) for i in range(len(data))]


@pytest.mark.parametrize(("count", "share", "held"), [(2, 0.1, 1), (60, 0.1, 6), (10, 0.99, 9)])
def test_parts_are_disjoint_and_complete(count: int, share: float, held: int) -> None:
    one, other = rows(count, "held_out", share), rows(count, "train", share)
    assert len(one) == held
    assert sorted(one + other) == list(range(count))


def test_the_choice_is_always_the_same() -> None:
    assert rows(100, "held_out") == rows(100, "held_out")


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="has 1 rows, expected at least 2"):
        Split(Numbers(1))
