"""The one LightningModule."""

from __future__ import annotations

import warnings
from typing import Any, Self

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from mmdlm.data.collate import Collated, batch
from mmdlm.loading.ckpt import ENTRY, entry, read
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.objective import Losses, Objective
from mmdlm.training import tune as tuning
from mmdlm.training.checkpoints import KeepLast, WholeFileIO
from mmdlm.training.new_model import NewModel
from mmdlm.training.optimizer import AdamW, Schedule
from mmdlm.training.reduction import Totals, totals
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
            vocabulary, encoders, attention and action statistics.
        init: checkpoint of an earlier stage (`.ckpt`) whose weights the new model starts from.
        tune: per pattern of parameter names, "frozen", or lr and weight_decay; the last matching
            pattern decides, see `mmdlm.training.tune`.
        optimizer: settings of AdamW.
        schedule: warm-up and decay of the learning rate.
        checkpointing: compute the activations of each backbone block again in the backward pass
            instead of keeping them: less memory, about a third more time.
        weights: weight of each data set in the loss; 1 where not given.
        words: vocabulary of a new model; filled in from the data.
        statistics: action and state statistics of the data; filled in from the data.

    Raises:
        ValueError: neither or both of `blueprint` and `source` are given, `init` is given beside
            `source`, or `tune` does not fit the model; see also `NewModel.build`.
    """

    def __init__(
        self,
        objective: Objective,
        blueprint: NewModel | None = None,
        source: str | None = None,
        init: str | None = None,
        tune: dict[str, Rule] | None = None,
        optimizer: AdamW = ADAMW,
        schedule: Schedule = SCHEDULE,
        checkpointing: bool = False,
        weights: dict[str, float] | None = None,
        words: list[str] | None = None,
        statistics: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.optimizer, self.schedule = optimizer, schedule
        self.weights, self.tune = weights or {}, tune or {}
        if (source is None) == (blueprint is None):
            seen = "neither" if source is None else "both"
            raise ValueError(
                f"{seen} of source and blueprint are given; give either source (train an existing "
                "model further) or blueprint (train a new one)"
            )
        if blueprint is not None:
            self.model = blueprint.build(words or [], statistics)
        else:
            if init is not None:
                raise ValueError(
                    f"init={init!r} has no effect beside source={source!r}, which has weights; "
                    "leave one of them out"
                )
            self.model = existing(source, statistics)
        if init is not None:
            self.start_from(init)
        self.model.backbone.checkpointing = checkpointing
        tuning.freeze(self.model, self.tune)
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
        if saved[ENTRY]["tokenizer"] != self.model.tokenizer.backend.to_str():
            raise ValueError(
                f"{checkpoint} was trained with another vocabulary; use the data sets of that stage"
            )
        self.load_state_dict(saved["state_dict"])

    def setup(self, stage: str) -> None:
        """Has checkpoints written as a whole, unless the trainer has its own way to write them."""
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = WholeFileIO()

    def configure_callbacks(self) -> list[Callback]:
        """The callback that keeps the last step."""
        return [KeepLast()]

    def training_step(self, batch: dict[str, Collated], index: int) -> Tensor:
        """Loss of one step over all data sets."""
        losses = {name: self.losses(part) for name, part in batch.items()}
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
        self._log("val", self.totals({name: self.losses(part) for name, part in batch.items()}))

    def test_step(self, batch: dict[str, Collated], index: int) -> None:
        """Metrics on test data with fixed noise."""
        self._log("test", self.totals({name: self.losses(part) for name, part in batch.items()}))

    def losses(self, part: Collated) -> Losses:
        """Sum and count of the loss of one data set's rows."""
        return self.objective.step(self.model, batch(self.model, part))

    def totals(self, losses: dict[str, Losses]) -> Totals:
        """Sums and counts over all processes; at most one collective call."""
        return totals(losses, self.device, self._over_processes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `mmdlm export` needs to build the model without this module's arguments."""
        checkpoint[ENTRY] = entry(self.model)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with one or two parameter groups per pattern of `tune`, and the schedule."""
        settings = self.optimizer
        groups = tuning.groups(self.model, self.tune, settings.lr, settings.weight_decay)
        optimizer = settings.build(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def rate(self, step: int) -> float:
        """Learning rate at a step as a fraction of the peak."""
        return self.schedule.factor(step, self.trainer.max_steps)

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


def existing(source: str, statistics: dict[str, Any] | None) -> MultimodalDLM:
    """The model of a source on the CPU in float32, ready to be trained.

    A policy keeps its own action and state statistics, as they define its action ids. It warns if
    those of the data differ.

    Args:
        source: see `mmdlm.load`.
        statistics: "action" and "state" of the data, None if they hold no actions.

    Raises:
        ValueError: the data hold actions and the model has no action vocabulary.
    """
    from mmdlm.checkpoint import load

    model = load(source, device="cpu", dtype="float32", pack=False)
    if statistics is not None:
        if model.robot is None:
            raise ValueError(
                f"the data hold actions, but {source} has no action vocabulary; train a policy, or "
                "a new model (blueprint)"
            )
        own = {"action": model.robot.action, "state": model.robot.state}
        other = sorted(name for name in own if own[name].statistics != statistics[name])
        if other:
            warnings.warn(
                f"{' and '.join(other)} statistics of the data differ from those of {source}, "
                "which are kept; values outside their range are clipped",
                stacklevel=2,
            )
    return model.train()
