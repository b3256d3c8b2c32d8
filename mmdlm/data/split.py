"""A fixed share of a data set, to hold it out from training."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np

from encoders.checks import Above, Below
from mmdlm.data.dataset import Dataset, Extent, Preset
from mmdlm.messages import Example
from mmdlm.processor import Processor


class Split(Dataset):
    """The training or the held-out rows of a data set.

    Which rows are held out follows from the number of rows, the share and the seed alone.

    Args:
        dataset: all rows.
        part: "train" or "held_out".
        share: of the rows that is held out; at least one row, and at least one stays.
        seed: of the choice.

    Raises:
        ValueError: the data set has fewer than two rows.
    """

    def __init__(
        self,
        dataset: Dataset,
        part: Literal["train", "held_out"] = "train",
        share: Annotated[float, Above(0), Below(1)] = 0.1,
        seed: int = 0,
    ) -> None:
        count = len(dataset)
        if count < 2:
            raise ValueError(f"the data set has {count} rows, expected at least 2 to hold one out")
        if not 0 < share < 1:
            raise ValueError(f"share is {share}, expected a number between 0 and 1")
        held_out = min(count - 1, max(1, round(count * share)))
        order = np.random.default_rng([seed, count]).permutation(count)
        chosen = order[:held_out] if part == "held_out" else order[held_out:]
        self.dataset, self.indices = dataset, np.sort(chosen)

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        """See `Dataset.sample`."""
        return self.dataset.sample(int(self.indices[index]), rng)

    def accepted(self, index: int) -> list[str]:
        """See `Dataset.accepted`."""
        return self.dataset.accepted(int(self.indices[index]))

    def extent(self, index: int) -> Extent | None:
        """See `Dataset.extent`."""
        return self.dataset.extent(int(self.indices[index]))

    def place(self, index: int) -> str:
        """See `Dataset.place`."""
        return self.dataset.place(int(self.indices[index]))

    def vocabulary(self) -> list[str]:
        """Words of all rows, held out or not."""
        return self.dataset.vocabulary()

    def texts(self, index: int) -> list[str]:
        """See `Dataset.texts`."""
        return self.dataset.texts(int(self.indices[index]))

    def connect(self, processor: Processor, preset: Preset | None = None) -> Self:
        """See `Dataset.connect`."""
        self.dataset.connect(processor, preset)
        return self

    def tasks(self) -> list[tuple[str, str | None, int]]:
        """See `Dataset.tasks`."""
        return self.dataset.tasks()
