"""The batches of a run, which follow from the seed and the step alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from mmdlm.data.collate import Collated, collate
from mmdlm.data.dataset import Dataset
from mmdlm.data.form import Form
from mmdlm.data.transfer import Transfer
from mmdlm.processor import Processor
from mmdlm.training.buckets import grouped


class Steps(TorchDataset):
    """Item s is the batch of one process at step s: data set name to `Collated`.

    Args:
        processor: preprocesses media and encodes text.
        datasets: by name.
        batch_size: rows per data set and process.
        seed: of order and noise.
        rank: this process.
        world: number of processes.
        shuffle: draw rows in a new random order each pass, else in their own order.
        accumulate: batches whose gradients are summed; they get the noise of one larger batch.
        lengths: by data set, tokens of each row; a batch of these data sets has rows of like
            length, see `mmdlm.training.buckets`.
        pack: see `mmdlm.training.data.Data`.
        form: which answers are learnt, and what follows them.
    """

    def __init__(
        self,
        processor: Processor,
        datasets: dict[str, Dataset],
        batch_size: dict[str, int],
        seed: int,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        accumulate: int = 1,
        lengths: Mapping[str, np.ndarray] | None = None,
        pack: int | None = None,
        form: Form | None = None,
    ) -> None:
        self.accumulate, self.lengths = accumulate, lengths or {}
        self.pack, self.form = pack, form or Form()
        self.processor, self.datasets, self.batch_size = processor, datasets, batch_size
        self.seed, self.rank, self.world, self.shuffle = seed, rank, world, shuffle
        self.orders: dict[tuple[str, int], np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the orders, which each worker computes itself."""
        return {**vars(self), "orders": {}}

    def __len__(self) -> int:
        """Steps after which every data set was seen once."""
        return max(
            -(-len(d) // (self.batch_size[name] * self.world)) for name, d in self.datasets.items()
        )

    def __getitem__(self, step: int) -> Transfer:
        """The batches of a step."""
        return Transfer((name, self._rows(name, step)) for name in self.datasets)

    def _rows(self, name: str, step: int) -> Collated:
        dataset, size = self.datasets[name], self.batch_size[name]
        total = size * self.world
        # Interleaved over processes, which together hold the rows of one larger batch.
        places = np.arange(self.rank, total, self.world)
        key = name_key(name)
        samples, seeds = [], []
        for place in step * total + places:
            epoch, at = divmod(int(place), len(dataset))
            index = int(self._order(name, epoch)[at]) if self.shuffle else at
            rng = np.random.default_rng([self.seed, key, int(place)])
            seeds.append(int(rng.integers(1 << 62)))
            samples.append(self.form.of(dataset.sample(index, rng), self.processor, rng))
        window, part = divmod(step, self.accumulate)
        shared = np.random.default_rng([self.seed, key, window, 1]).random()
        phase = (shared + (part + places / total) / self.accumulate) % 1
        noise = torch.tensor(seeds), torch.from_numpy(phase)
        extra = self.form.extra(np.random.default_rng([self.seed, key, step, self.rank, 3]))
        also = self.form.ids(self.processor)
        return collate(self.processor, samples, *noise, self.pack, extra, also)

    def _order(self, name: str, epoch: int) -> np.ndarray:
        """The order of a data set's rows in one pass; the latest eight orders are kept."""
        if (name, epoch) not in self.orders:
            rng = np.random.default_rng([self.seed, name_key(name), epoch, 2])
            while len(self.orders) >= 8:
                del self.orders[next(iter(self.orders))]
            order = rng.permutation(len(self.datasets[name]))
            if name in self.lengths:
                size = self.batch_size[name] * self.world
                first = min(len(order), -epoch * len(order) % size)
                order = grouped(order, self.lengths[name], size, first, rng)
            self.orders[name, epoch] = order
        return self.orders[name, epoch]


def name_key(name: str) -> int:
    """A number for a data set's name, the same in every process and Python."""
    return zlib.crc32(name.encode())
