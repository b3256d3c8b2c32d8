"""The one data module: global batches that depend on the seed and the step alone."""

from __future__ import annotations

import os
import pickle
import time
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from mmdlm.data.collate import Collated, collate
from mmdlm.data.dataset import Dataset
from mmdlm.data.transfer import Transfer
from mmdlm.messages import Example
from mmdlm.processor import Processor
from mmdlm.training.seed import given_or_global

MOST_WORKERS = 4
"""Workers that are started without being asked for."""
GAIN = 4
"""How much longer preparing a batch must take than moving it, for workers to pay."""
START_SECONDS = 20.0
"""Seconds that preparing all batches must take, for workers to pay: they take some to start."""


class Data(lightning.LightningDataModule):
    """Mixes data sets: every step holds rows of each of them.

    Which rows a step holds, in which order and with which noise follows from (seed, step) alone.
    So a resumed run sees what an uninterrupted one sees, and two processes see together what one
    process with the doubled batch sees.

    Args:
        train: data sets by name.
        batch_size: rows of each data set per step and process, or one number for all of them.
        val: held-out data sets by name; may be empty.
        test: data sets of `mmdlm test` by name; those of `val` if empty.
        val_rows: rows of each data set that are used in a validation or test.
        seed: of order and noise; None for that of `--seed_everything`.
        workers: processes that prepare batches; 0 prepares them in the training process. They
            get the data sets and the processor (tokenizer, preprocessing), but no weights. None:
            up to four on cores that training leaves idle, if preparing the first batches takes
            much longer than moving them between processes and the run is long, else 0.
        start_method: how workers are started, "fork", "spawn" or "forkserver"; None for Python's
            default. Batches do not depend on it.

    Raises:
        ValueError: data sets and batch sizes have different names, `val_rows` is below 1, or there
            are no workers to start with `start_method`.
    """

    def __init__(
        self,
        train: dict[str, Dataset],
        batch_size: dict[str, int] | int,
        val: dict[str, Dataset] | None = None,
        test: dict[str, Dataset] | None = None,
        val_rows: int = 64,
        seed: int | None = None,
        workers: int | None = None,
        start_method: Literal["fork", "spawn", "forkserver"] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(batch_size, int):
            batch_size = dict.fromkeys(train, batch_size)
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
        self.val_rows, self.seed = val_rows, given_or_global(seed)
        self.workers, self.start_method = workers, start_method
        self.tasks: list[str] = []
        """Tasks that the data teach, after `setup`."""

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

    def setup(self, stage: str) -> None:
        """Tells the data sets what only the model knows, see `Dataset.connect`."""
        if stage == "fit" and not self.val:
            self.trainer.limit_val_batches = 0  # else Lightning warns of an empty loader
        model = self.trainer.lightning_module.model
        for dataset in (*self.train.values(), *self.val.values(), *self.test.values()):
            dataset.connect(model.processor, model.preset)
        for dataset in self.train.values():
            for task, prompt, length in dataset.tasks():
                self.tasks.append(task)
                entry = model.preset.setdefault(task, {})
                if prompt is not None:
                    entry.setdefault("prompt", prompt)
                entry["length"] = max(length, entry.get("length") or 0)

    def train_dataloader(self) -> DataLoader:
        """Batches from the trainer's current step on, see `RemainingSteps`."""
        trainer = self.trainer
        steps = Steps(
            trainer.lightning_module.model.processor,
            self.train,
            self.batch_size,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
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

    def predict_dataloader(self) -> DataLoader:
        """Rows of the test data, or else of the held-out data, by data set, in order.

        Raises:
            ValueError: there are no such data, they have no text answers, or several processes
                would each answer them.
        """
        datasets = self.test or self.val
        if not datasets:
            raise ValueError("predict: there are no questions; give data.test or data.val")
        if self.trainer.world_size > 1:
            raise ValueError("predict: the answers are written by one process; set trainer.devices")
        batches = []
        for name, dataset in datasets.items():
            rows = [
                dataset.sample(i, np.random.default_rng(i))
                for i in range(min(self.val_rows, len(dataset)))
            ]
            if any(not isinstance(turn.answer, str) for row in rows for turn in row.turns):
                raise ValueError(
                    f"predict: the answers of {name} are not texts; use mmdlm act for a policy"
                )
            batches += [Rows(name, rows[i : i + 32]) for i in range(0, len(rows), 32)]
        return DataLoader(batches, batch_size=None)

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
        workers = self.workers
        if workers is None:
            workers = useful_workers(steps, len(order), idle_cores(self.trainer))
            if workers:
                rank_zero_info(f"{workers} workers prepare batches; choose with data.workers")
        return Stateless(
            steps,
            batch_size=None,
            sampler=order,
            num_workers=workers,
            collate_fn=unchanged,
            persistent_workers=workers > 0,
            multiprocessing_context=self.start_method if workers else None,
        )


class Rows:
    """Examples of a data set; a plain object, as trainers look for tensors in all others."""

    def __init__(self, name: str, examples: list[Example]) -> None:
        self.name, self.examples = name, examples


def unchanged(batch: Transfer) -> Transfer:
    """The batch; the default of the loader would copy it."""
    return batch


def idle_cores(trainer: lightning.Trainer) -> int:
    """Cores of one training process that its own computation leaves idle."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    is_cpu = trainer.lightning_module.model.device.type == "cpu"
    used = torch.get_num_threads() if is_cpu else 1
    return (cores or 1) // max(1, trainer.num_devices) - used


def useful_workers(steps: Steps, count: int, idle: int) -> int:
    """Number of workers that make a run faster, found by preparing the first batches.

    Data sets that cannot be pickled get none.

    Args:
        steps: what is prepared, in a copy: files that it opens must not be shared by workers.
        count: batches of the run.
        idle: cores that training leaves idle.
    """
    if idle < 1:
        return 0
    try:
        copy = pickle.loads(pickle.dumps(steps))
    except (pickle.PicklingError, AttributeError, TypeError):
        return 0
    copy[0]  # the first one also opens files
    begin = time.perf_counter()
    batch = copy[1]
    prepared = time.perf_counter()
    batch.copied()
    moving = time.perf_counter() - prepared
    pays = prepared - begin > GAIN * moving and (prepared - begin) * count > START_SECONDS
    return min(idle, MOST_WORKERS) if pays else 0


class RemainingSteps:
    """Numbers of the batches of an epoch, from the trainer's current step on.

    A run of `max_epochs`, or one that only `max_time` bounds, has epochs in which every data set is
    seen at least once. A run of `max_steps` alone is one epoch, so that nothing interrupts it.

    Args:
        trainer: its step is read when iteration begins.
        once: batches after which every data set was seen once.

    Raises:
        ValueError: nothing ends the run.
    """

    def __init__(self, trainer: lightning.Trainer, once: int) -> None:
        self.trainer = trainer
        summed = trainer.accumulate_grad_batches
        bounded = trainer.max_steps > 0 or (trainer.max_epochs or -1) > 0
        if not bounded and not any(isinstance(c, Timer | EarlyStopping) for c in trainer.callbacks):
            raise ValueError(
                "training would never end; set trainer.max_steps or trainer.max_epochs, or "
                "trainer.max_time"
            )
        is_one_epoch = trainer.max_steps > 0 and (trainer.max_epochs or -1) < 0
        # Whole optimizer steps: a step of fewer batches at the end of an epoch would be smaller.
        steps = trainer.max_steps if is_one_epoch else -(-once // summed)
        self.total = steps * summed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        done = first % self.total if self.trainer.limit_train_batches == 1.0 else 0
        return iter(range(first, first - done + self.total))


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
        accumulate: batches whose gradients are summed; they get the noise of one larger batch.
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
    ) -> None:
        self.accumulate = accumulate
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
            samples.append(dataset.sample(index, rng))
        window, part = divmod(step, self.accumulate)
        shared = np.random.default_rng([self.seed, key, window, 1]).random()
        phase = (shared + (part + places / total) / self.accumulate) % 1
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
