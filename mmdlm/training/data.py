"""The one data module: global batches that depend on the seed and the step alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from mmdlm.data.collate import Collated, collate
from mmdlm.data.dataset import Dataset
from mmdlm.processor import Processor


class Data(lightning.LightningDataModule):
    """Mixes data sets: every step holds rows of each of them.

    Which rows a step holds, in which order and with which noise follows from (seed, step) alone.
    So a resumed run sees what an uninterrupted one sees, and two processes see together what one
    process with the doubled batch sees.

    Args:
        train: data sets by name.
        batch_size: rows of each data set per step and process.
        val: held-out data sets by name; may be empty.
        test: data sets of `mmdlm test` by name; those of `val` if empty.
        val_rows: rows of each data set that are used in a validation or test.
        seed: of order and noise.
        workers: processes that prepare batches; 0 prepares them in the training process. They
            get the data sets and the processor (tokenizer, preprocessing), but no weights.
        start_method: how workers are started, "fork", "spawn" or "forkserver"; None for Python's
            default. Batches do not depend on it.

    Raises:
        ValueError: data sets and batch sizes have different names, `val_rows` is below 1, or there
            are no workers to start with `start_method`.
    """

    def __init__(
        self,
        train: dict[str, Dataset],
        batch_size: dict[str, int],
        val: dict[str, Dataset] | None = None,
        test: dict[str, Dataset] | None = None,
        val_rows: int = 64,
        seed: int = 0,
        workers: int = 0,
        start_method: Literal["fork", "spawn", "forkserver"] | None = None,
    ) -> None:
        super().__init__()
        if set(train) != set(batch_size):
            raise ValueError(
                f"data sets {sorted(train)} and batch sizes {sorted(batch_size)} differ; "
                "give every data set a batch size"
            )
        if val_rows < 1:
            raise ValueError(f"val_rows is {val_rows}, expected at least 1")
        if start_method is not None and workers == 0:
            raise ValueError(
                f"start_method={start_method!r} has no effect without workers; set workers"
            )
        self.train, self.val, self.test, self.batch_size = train, val or {}, test or {}, batch_size
        self.val_rows, self.seed = val_rows, seed
        self.workers, self.start_method = workers, start_method

    @property
    def words(self) -> list[str]:
        """Every word of all data sets, sorted: the vocabulary of a model trained from scratch."""
        datasets = (*self.train.values(), *self.val.values(), *self.test.values())
        return sorted({word for dataset in datasets for word in dataset.vocabulary()})

    @property
    def statistics(self) -> dict[str, Any] | None:
        """Action and state statistics of the data set that has them, else None."""
        found = [d.statistics() for d in self.train.values() if hasattr(d, "statistics")]
        if len(found) > 1:
            raise ValueError("several data sets have action statistics; train on one of them")
        return found[0] if found else None

    def train_dataloader(self) -> DataLoader:
        """Batches from the trainer's current step to its last, as one epoch."""
        trainer = self.trainer
        steps = Steps(
            trainer.lightning_module.model.processor,
            self.train,
            self.batch_size,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
        )
        return self._loader(steps, RemainingSteps(trainer, len(steps)))

    def val_dataloader(self) -> DataLoader | list:
        """The first rows of each held-out data set, with fixed noise."""
        if not self.val and self.trainer.state.fn == TrainerFn.VALIDATING:
            raise ValueError("validate: there are no held-out data; give data.val")
        return self._held_out(self.val)

    def test_dataloader(self) -> DataLoader | list:
        """The first rows of each test data set, or else held-out one, with fixed noise."""
        if not self.test:
            if not self.val:
                raise ValueError("test: there are no data to test on; give data.test or data.val")
            rank_zero_info("data.test is empty, so the test is on data.val")
        return self._held_out(self.test or self.val)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        """The batch unchanged: the model moves what it encodes and lays out the text after that."""
        return batch

    def _held_out(self, datasets: dict[str, Dataset]) -> DataLoader | list:
        if not datasets:
            return []
        processor = self.trainer.lightning_module.model.processor
        size = {name: min(32, len(d), self.val_rows) for name, d in datasets.items()}
        steps = Steps(processor, datasets, size, seed=0, shuffle=False)
        return self._loader(steps, list(range(max(1, self.val_rows // max(size.values())))))

    def _loader(self, steps: Steps, order: RemainingSteps | list[int]) -> DataLoader:
        return Stateless(
            steps,
            batch_size=None,
            sampler=order,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            multiprocessing_context=self.start_method,
        )


class RemainingSteps:
    """Numbers of the batches from the trainer's current step to its last.

    Args:
        trainer: its step is read when iteration begins.
        once: batches after which every data set was seen once; used without `max_steps`.
    """

    def __init__(self, trainer: lightning.Trainer, once: int) -> None:
        self.trainer = trainer
        steps = trainer.max_steps if trainer.max_steps > 0 else trainer.max_epochs * once
        if steps < 0:
            raise ValueError(
                "training would never end; set trainer.max_steps or trainer.max_epochs"
            )
        self.total = steps * trainer.accumulate_grad_batches

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return iter(
            range(self.trainer.global_step * self.trainer.accumulate_grad_batches, self.total)
        )


class Stateless(DataLoader):
    """A loader with no state to restore, as its first batch follows from the trainer's step.

    The two methods keep Lightning from warning that a run resumed within an epoch repeats data.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


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
    ) -> None:
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

    def __getitem__(self, step: int) -> dict[str, Collated]:
        """The batches of a step."""
        return {name: self._rows(name, step) for name in self.datasets}

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
            samples.append(dataset.sample(index, rng))
        shared = np.random.default_rng([self.seed, key, step, 1]).random()
        phase = (shared + places / total) % 1
        return collate(self.processor, samples, torch.tensor(seeds), torch.from_numpy(phase))

    def _order(self, name: str, epoch: int) -> np.ndarray:
        """The order of a data set's rows in one pass; the latest eight orders are kept."""
        if (name, epoch) not in self.orders:
            rng = np.random.default_rng([self.seed, name_key(name), epoch, 2])
            while len(self.orders) >= 8:
                del self.orders[next(iter(self.orders))]
            self.orders[name, epoch] = rng.permutation(len(self.datasets[name]))
        return self.orders[name, epoch]


def name_key(name: str) -> int:
    """A number for a data set's name, the same in every process and Python."""
    return zlib.crc32(name.encode())
