"""The one data module: global batches that depend on the seed and the step alone."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from mmdlm.data.dataset import Dataset
from mmdlm.data.form import Form
from mmdlm.data.transfer import Transfer
from mmdlm.messages import Example
from mmdlm.model import MultimodalDLM
from mmdlm.processor import Processor
from mmdlm.training.buckets import LEAST_SAVED, lengths, saved
from mmdlm.training.seed import given_or_global
from mmdlm.training.steps import Steps

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
        buckets: whether the rows of a batch have about the same length, so that little is padding.
            None: for data sets that tell their lengths without opening media, if that saves at
            least 5 % of the tokens, and nothing is packed. The order stays random, and follows from
            the seed alone. Where answers differ in length (`tail`), a token of a batch of short
            ones weighs more in an objective that divides by the answer tokens of the batch.
        pack: conversations of a batch are packed into rows of this many tokens, or as many as the
            longest one has. They do not attend to each other, and masks and loss are those of one
            conversation per row. `batch_size` still counts conversations, and attention takes the
            square of a row's tokens. None: not packed.
        tail: a text answer is followed by 1 to `tail` end tokens, a random number, instead of as
            many as fill its canvas. Real answers differ in length, and few tokens are then spent on
            end tokens; but a model that fills a whole canvas at once needs to learn these (LLaDA),
            so keep None for it, and set `tail` where decoding ends at the first end token.
        pad: instead, the rows of a batch are extended by padding tokens (`Spec.pad_id`) to the
            length of the longest, and of it by u, a random integer from -pad to pad - 1, if that is
            positive; all of them are learnt. As the trainers of LaViDa (128), LLaDA-V and Dream-VL
            (0) do.
        end_of_turn: whether a text answer ends with the token that ends a turn in the chat
            template, and padding tokens fill its canvas, instead of end tokens alone.
        turns: "all": every answer of a conversation is learnt, given the turns before it. "one":
            in each pass one of them, drawn at random, with its question and all media before it,
            without the turns before (LaViDa). "plain": an answer and a line break follow its media,
            without question and template (first stage of LLaVA).
        also: texts of one token each, such as control tokens of the chat template, that are learnt
            wherever they occur; full attention only. Choose `draw.per: row` in the objective, so
            that they share the noise level of the answer.

    Raises:
        ValueError: data sets and batch sizes have different names, a number is below 1, there
            are no workers to start with `start_method`, no lengths for `buckets`, or `pad` is given
            with `tail`, or one of `pad` and `also` with `pack`.
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
        buckets: bool | None = None,
        pack: int | None = None,
        tail: int | None = None,
        pad: int | None = None,
        end_of_turn: bool = False,
        turns: Literal["all", "one", "plain"] = "all",
        also: list[str] = (),
    ) -> None:
        super().__init__()
        if isinstance(batch_size, int):
            batch_size = dict.fromkeys(train, batch_size)
        if set(train) != set(batch_size):
            raise ValueError(
                f"data sets {sorted(train)} and batch sizes {sorted(batch_size)} differ; "
                "give every data set a batch size"
            )
        if pack is not None and (pad is not None or also):
            raise ValueError("pack excludes pad and also, which change rows")
        for key, value in (("val_rows", val_rows), ("pack", pack)):
            if value is not None and value < 1:
                raise ValueError(f"{key} is {value}, expected at least 1")
        if start_method is not None and workers == 0:
            raise ValueError(
                f"start_method={start_method!r} has no effect without workers; set workers"
            )
        self.train, self.val, self.test, self.batch_size = train, val or {}, test or {}, batch_size
        self.val_rows, self.seed = val_rows, given_or_global(seed)
        self.workers, self.start_method = workers, start_method
        self.buckets, self.pack, self.tail, self.pad = buckets, pack, tail, pad
        self.form = Form(turns, end_of_turn, tail, pad, tuple(also))
        self.lengths: dict[str, np.ndarray] = {}
        """Tokens of each row of the data sets that have buckets, after `setup`."""
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
        if stage == "fit":
            self.measure(model, self.trainer.world_size)
        for dataset in self.train.values():
            for task, prompt, length in dataset.tasks():
                self.tasks.append(task)
                entry = model.preset.setdefault(task, {})
                if prompt is not None:
                    entry.setdefault("prompt", prompt)
                entry["length"] = max(length, entry.get("length") or 0)

    def measure(self, model: MultimodalDLM, world: int = 1) -> None:
        """Sets `lengths` of the data sets that get buckets, which are connected to the model."""
        if self.buckets is False or (self.buckets is None and self.pack is not None):
            return
        for name, dataset in self.train.items():
            found = lengths(dataset, model, self.tail if self.pad is None else 1)
            gain = 0.0 if found is None else saved(found, self.batch_size[name] * world)
            if found is not None and (self.buckets or gain >= LEAST_SAVED):
                self.lengths[name] = found
                rank_zero_info(
                    f"{name}: the rows of a batch have like lengths, which saves {gain:.0%} of the "
                    "tokens (data.buckets)"
                )
        if self.buckets and not self.lengths:
            raise ValueError(
                "buckets is True, but no data set tells the lengths of its rows; leave it out"
            )

    def steps(
        self, processor: Processor, rank: int = 0, world: int = 1, accumulate: int = 1
    ) -> Steps:
        """The batches of training, see `Steps`."""
        return Steps(
            *(processor, self.train, self.batch_size, self.seed, rank, world),
            accumulate=accumulate,
            lengths=self.lengths,
            pack=self.pack,
            form=self.form,
        )

    def train_dataloader(self) -> DataLoader:
        """Batches from the trainer's current step on, see `RemainingSteps`."""
        trainer = self.trainer
        processor, ranks = trainer.lightning_module.model.processor, trainer.world_size
        summed = trainer.accumulate_grad_batches
        steps = self.steps(processor, trainer.global_rank, ranks, summed)
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
        steps = Steps(processor, datasets, size, seed=0, shuffle=False, form=self.form)
        return self._loader(steps, list(range(max(1, self.val_rows // max(size.values())))))

    def _loader(self, steps: Steps, order: RemainingSteps | list[int]) -> DataLoader:
        workers = self.workers
        if workers is None:
            workers = useful_workers(steps, len(order), idle_cores(self.trainer))
            if workers:
                more = "worker prepares" if workers == 1 else "workers prepare"
                rank_zero_info(f"{workers} {more} batches; choose with data.workers")
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
