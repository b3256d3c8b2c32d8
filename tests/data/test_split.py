"""Held-out shares: disjoint, complete and always the same."""

from __future__ import annotations

import numpy as np
import pytest

from mmdlm.data.dataset import Dataset, Turn, example
from mmdlm.data.split import Split
from mmdlm.messages import Example


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


def test_texts_are_those_of_the_rows_of_the_part() -> None:
    part = Split(Talk(), "held_out", 0.5)
    said = [part.texts(i) for i in range(len(part))]
    assert said == [["who?", f"row {i}"] for i in part.indices]
    assert all(data.texts(0)[:2] == ["who?", "row 0"] for data in (Talk(), Actions()))
    assert Actions().texts(0)[2:] == ["go"]


class Talk(Dataset):
    """Rows of a question and its answer."""

    def __len__(self) -> int:
        return 6

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        return example((Turn("who?", f"row {index}", 4),))


class Actions(Talk):
    """Rows that also hold actions, which are no text."""

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        robot = Turn("go", np.zeros((1, 2)), 2)
        return example((Turn("who?", f"row {index}", 4), robot))
