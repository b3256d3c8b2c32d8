"""The one LightningModule."""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mmdlm.checkpoint import save
from mmdlm.data.collate import Collated, batch
from mmdlm.data.dataset import Dataset
from mmdlm.loading.ckpt import ENTRY, PREFIX, Base, digest, entry, read
from mmdlm.objectives.objective import Losses, Objective
from mmdlm.training import elapsed, lora, sharding, strategies
from mmdlm.training import tune as tuning
from mmdlm.training.checkpoints import KeepLast
from mmdlm.training.data import Rows
from mmdlm.training.new_model import NewModel
from mmdlm.training.optimizer import AdamW, Schedule
from mmdlm.training.reduction import Totals, totals
from mmdlm.training.source import existing
from mmdlm.training.tune import Rule

ADAMW, SCHEDULE = AdamW(), Schedule()


class Module(lightning.LightningModule):
    """Trains a new model, or an existing one further, with any objective.

    The loss of a step is the weighted mean over data sets of sum / count, both summed over all
    processes first, so it does not depend on how many processes share the global batch.

    Args:
        objective: what is minimised.
        blueprint: a new model; its vocabulary and action statistics come from the data.
        source: an existing model instead: a bundled name, a folder or a hub id. It keeps its
            encoders and attention; a vocabulary of whole words gets the words of the data that it
            lacks.
        init: checkpoint of an earlier stage (`.ckpt`) whose weights the new model starts from.
        tune: per pattern of parameter names, "frozen", or lr, weight_decay and lora; the last
            matching pattern decides, see `mmdlm.training.tune`.
        optimizer: settings of our AdamW, or a class of `torch.optim` with its arguments.
        schedule: warm-up and decay of the learning rate, or a class of
            `torch.optim.lr_scheduler`, which is called after every step.
        quantize: "int8" to hold the blocks of the source in 8 bits, which needs torchao. They are
            frozen, so `tune` must train them by LoRA or freeze them; export merges the adapter
            into the weights as they were.
        checkpointing: compute the activations of each backbone block again in the backward pass
            instead of keeping them: less memory, about a third more time.
        weights: weight of each data set in the loss; 1 where not given.
        statistics: of the actions and states of a policy that is trained further: "data" for
            those of the data, "source" for its own, which its other skills need. None: its own if
            the data are within their ranges, else those of the data; one line says which.
        words: words of the data; filled in from the data.
        datasets: training data sets by name, whose texts a new byte-level BPE is trained on; filled
            in from the data.
        data_statistics: action and state statistics of the data; filled in from the data.
        objectives: by data set, what is minimised on its rows instead of `objective`.

    Raises:
        ValueError: neither or both of `blueprint` and `source` are given, an option has no effect
            beside them, or `tune` does not fit the model, or asks for LoRA of a new one; see also
            `NewModel.build`.
    """

    def __init__(
        self,
        objective: Objective,
        blueprint: NewModel | None = None,
        source: str | None = None,
        init: str | None = None,
        tune: dict[str, Rule] | None = None,
        optimizer: AdamW | OptimizerCallable = ADAMW,
        schedule: Schedule | LRSchedulerCallable = SCHEDULE,
        quantize: Literal["int8"] | None = None,
        checkpointing: bool = False,
        weights: dict[str, float] | None = None,
        statistics: Literal["data", "source"] | None = None,
        words: list[str] | None = None,
        datasets: dict[str, Dataset] | None = None,
        data_statistics: dict[str, Any] | None = None,
        objectives: dict[str, Objective] | None = None,
    ) -> None:
        super().__init__()
        self.objective, self.objectives = objective, objectives or {}
        self.seed = torch.initial_seed()
        self.optimizer, self.schedule = optimizer, schedule
        self.weights, self.tune = weights or {}, tune or {}
        if (source is None) == (blueprint is None):
            seen = "neither" if source is None else "both"
            raise ValueError(
                f"{seen} of source and blueprint are given; give either source (train an existing "
                "model further) or blueprint (train a new one)"
            )
        if quantize is not None and not any(map(tuning.lora_of, self.tune.values())):
            raise ValueError(f"quantize={quantize!r} has no effect without LoRA; see tune")
        if statistics is not None and (source is None or data_statistics is None):
            why = "without source" if source is None else "as the data hold no actions"
            raise ValueError(f"statistics={statistics!r} has no effect {why}; leave it out")
        if blueprint is not None:
            self.model = blueprint.build(words or [], data_statistics, datasets)
        else:
            if init is not None:
                raise ValueError(
                    f"init={init!r} has no effect beside source={source!r}, which has weights; "
                    "leave one of them out"
                )
            self.model, new = existing(source, data_statistics, words or [], statistics, quantize)
        if init is not None:
            self.start_from(init)
        self.model.backbone.checkpointing = checkpointing
        tuning.freeze(self.model, self.tune)
        self.base: tuple[str, str] | None = None
        """Source and digest of the weights that a LoRA adapter is trained on."""
        if any(map(tuning.lora_of, self.tune.values())):
            if source is None:
                raise ValueError("tune: LoRA trains an existing model further; give source")
            self.base = (source, digest(self.model.report.files))
            self._is_reached = False
            lora.inject(self.model, self.tune, len(new), source)
        elif source is not None and new and not self.model.backbone.embed.weight.requires_grad:
            warnings.warn(
                "tune freezes the embedding, so the new words are not learned; add "
                "'backbone.embed.*': {} and 'backbone.out.*': {} to it, or use LoRA",
                stacklevel=2,
            )
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Train mode for everything but frozen parts, whose dropout stays off."""
        super().train(mode)
        tuning.set_frozen_to_eval(self.model)
        return self

    def start_from(self, checkpoint: str) -> None:
        """Loads the weights of an earlier stage.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a checkpoint of ours; or that stage had another vocabulary, in
                which the same ids mean other words.
            RuntimeError: the weights do not fit the model.
        """
        saved = read(checkpoint)
        if (base := Base.of(saved)) is not None:
            raise base.not_whole(checkpoint)
        self._check_vocabulary(saved, checkpoint)
        self.load_state_dict(saved["state_dict"])

    def _check_vocabulary(self, saved: dict[str, Any], name: str) -> None:
        """Raises ValueError if a checkpoint's ids mean other words than those of the model."""
        tokenizer = self.model.tokenizer
        if tokenizer is not None and saved[ENTRY]["tokenizer"] != tokenizer.backend.to_str():
            raise ValueError(
                f"{name} was trained with another vocabulary; use the data sets of that run"
            )

    def setup(self, stage: str) -> None:
        """Prepares the trainer for our batches, weights and checkpoints."""
        trainer = self.trainer
        if stage == "fit" and (
            unknown := sorted(set(self.weights) - set(trainer.datamodule.train))
        ):
            raise ValueError(
                f"weights: there is no data set {unknown[0]!r}, only "
                f"{sorted(trainer.datamodule.train)}"
            )
        strategies.prepare(trainer, self.model)

    def configure_model(self) -> None:
        """Splits the weights over processes if the strategy asks for it."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            sharding.shard(self, self.device_mesh)

    def configure_callbacks(self) -> list[Callback]:
        """The callback that keeps the last step."""
        return [KeepLast()]

    def on_train_batch_start(self, batch: dict[str, Collated], index: int) -> None:
        """Lets dropout depend on the seed, the process and the step only, also after a resume."""
        done = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed((self.seed + 1_000_003 * done + self.global_rank) % 2**63)

    def training_step(self, batch: dict[str, Collated], index: int) -> Tensor:
        """Loss of one step over all data sets."""
        losses = self.losses(batch)
        logged = {
            name: each._replace(logs={"loss": (each.sum, each.count), **each.logs})
            for name, each in losses.items()
        }
        totals = self.totals(logged)
        if self._is_logging_step():
            self._log("train", totals)
        weights = {name: self.weights.get(name, 1.0) for name in batch}
        share = sum(weights.values())
        # DDP averages gradients over processes; the sum must not be divided by their number.
        world = self.trainer.world_size
        means = {name: totals.mean(name, each) * world for name, each in losses.items()}
        return sum(mean * weights[name] / share for name, mean in means.items())

    def validation_step(self, batch: dict[str, Collated], index: int) -> None:
        """Metrics on held-out data with fixed noise."""
        self._log("val", self.totals(self.losses(batch)))

    def test_step(self, batch: dict[str, Collated], index: int) -> None:
        """Metrics on test data with fixed noise."""
        self._log("test", self.totals(self.losses(batch)))

    def predict_step(self, batch: Rows, index: int) -> Rows:
        """The rows as they are; a callback of `mmdlm predict` answers them."""
        return batch

    def losses(self, parts: dict[str, Collated]) -> dict[str, Losses]:
        """Sum and count of the loss of each data set's rows."""
        losses = {
            name: self.objectives.get(name, self.objective).step(
                self.model, batch(self.model, part)
            )
            for name, part in parts.items()
        }
        if isinstance(self, FSDPModule) and torch.is_grad_enabled():
            name, first = next(iter(losses.items()))
            zero = sharding.zero_of_used(self.model, parts.values(), self)
            losses[name] = first._replace(sum=first.sum + zero)
        return losses

    def totals(self, losses: dict[str, Losses]) -> Totals:
        """Sums and counts over all processes; at most one collective call."""
        return totals(losses, self.device, self._over_processes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `mmdlm export` needs to build the model without this module's arguments."""
        checkpoint[ENTRY] = entry(self.model)
        if self.base is not None:
            trained = [PREFIX + name for name, _ in lora.trainable(self.model)]
            base = Base(*self.base, lora.settings(self.model), trained)
            checkpoint[ENTRY]["base"] = dataclasses.asdict(base)
            frozen, state = self.frozen(), checkpoint["state_dict"]
            checkpoint["state_dict"] = {n: v for n, v in state.items() if n not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes a checkpoint of a LoRA adapter with the weights of its source.

        Raises:
            ValueError: they are not those it was trained on, only one of run and checkpoint has an
                adapter, or the data give another vocabulary.
        """
        base = Base.of(checkpoint) if ENTRY in checkpoint else None
        if (base is None) != (self.base is None):
            seen = "no LoRA adapter" if base is None else f"a LoRA adapter of {base.source}"
            raise ValueError(
                f"the checkpoint holds {seen}, and this run trains "
                f"{'none' if self.base is None else 'one'}; resume with the settings of its run"
            )
        if ENTRY in checkpoint:
            self._check_vocabulary(checkpoint, "the checkpoint")
        if base is not None:
            base.check(self.base[1], "the checkpoint")
            checkpoint["state_dict"] = self.frozen() | checkpoint["state_dict"]

    def frozen(self) -> dict[str, Tensor]:
        """Parameters that are not trained, by name."""
        return {n: each.detach() for n, each in self.named_parameters() if not each.requires_grad}

    def write(self, folder: Path) -> str:
        """Writes the model, or the LoRA adapter, into an empty or new folder.

        Returns:
            what to give as --model to use it.
        """
        if self.base is None:
            save(self.model, folder)
            return str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lora.extract(self.model).write(folder)
        return f"{self.base[0]} --adapter {folder}"

    def on_after_backward(self) -> None:
        """Checks that every layer with a LoRA adapter is called."""
        if self.base is not None and not self._is_reached:
            self._is_reached = lora.check_reached(self.model)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer with one or two parameter groups per pattern of `tune`, and the rate."""
        settings = self.optimizer
        ours = isinstance(settings, AdamW)
        rates = (settings.lr, settings.weight_decay, settings.layer_decay) if ours else (None, None)
        groups = tuning.groups(self.model, self.tune, *rates)
        optimizer = settings.build(groups) if ours else settings(groups)
        if isinstance(self.schedule, Schedule):
            timer = next((c for c in self.trainer.callbacks if isinstance(c, Timer)), None)
            rate = partial(self.rate, timer=timer)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        else:
            scheduler = self.schedule(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def rate(self, step: int, timer: Timer | None = None) -> float:
        """Learning rate at a step as a fraction of the peak.

        Args:
            step: from 0.
            timer: the time that the run has, if that is given.
        """
        return self.schedule.factor(step, elapsed.done(self.trainer, step, timer))

    def _over_processes(self, values: Tensor) -> Tensor:
        """[M] summed over all processes."""
        if self.trainer.world_size == 1:
            return values
        return self.all_gather(values).sum(0)

    def _is_logging_step(self) -> bool:
        """Whether Lightning writes the metrics of the current step; other steps need no sync."""
        trainer = self.trainer
        return trainer.should_stop or (trainer.global_step + 1) % trainer.log_every_n_steps == 0

    def _log(self, prefix: str, totals: Totals) -> None:
        for name, value in totals.means().items():
            shown = name.endswith("/ce")
            self.log(f"{prefix}/{name}", value, prog_bar=shown, batch_size=1)
