"""Ends a run between two steps when the process is asked to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException


class StopBetweenSteps(Callback):
    """Ends training after the current step on SIGTERM or SIGINT (Ctrl-C), in all processes.

    Lightning's own handlers do not do: the one of SIGINT raises within a step, and weights that
    are half updated would be saved; the one of SIGTERM starts a collective call within another one,
    so several processes can wait for each other forever.

    Attributes:
        received: the signal, None before there is one.
    """

    received: signal.Signals | None = None

    def on_sanity_check_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Replaces the handlers of the trainer, which restores those of before the run."""
        self.on_train_start(trainer, pl_module)

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """The same, where there is no sanity check."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stops, unless gradients of this step are still being summed."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._stop(trainer)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stops within a validation of a run."""
        self._stop(trainer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends the process now

    def _stop(self, trainer: lightning.Trainer) -> None:
        stop = self.received is not None
        if trainer.world_size > 1:  # each may have received it, at another step than the others
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        is_last_step = 0 < trainer.max_steps <= trainer.global_step
        if stop and not is_last_step:
            raise SIGTERMException
