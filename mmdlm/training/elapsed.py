"""How much of a run is done."""

from __future__ import annotations

import math

import lightning
from lightning.pytorch.callbacks import Timer


def done(trainer: lightning.Trainer, step: int, timer: Timer | None = None) -> float:
    """Fraction of a run before a step, of its steps or of its time, whichever is larger.

    Args:
        trainer: of the run.
        step: from 0.
        timer: the time that the run has, if that is given.
    """
    found = step / total_steps(trainer)
    left = None if timer is None else timer.time_remaining()
    if left is not None:
        passed = timer.time_elapsed()
        # The processes' clocks differ, and their weights must not.
        found = max(found, trainer.strategy.broadcast(passed / (passed + left)))
    return found


def total_steps(trainer: lightning.Trainer) -> float:
    """Optimizer steps of a run; infinite if unknown, as before its data are set up.

    `Trainer.estimated_stepping_batches` would set up the data before a checkpoint is read, and thus
    start a resumed run at its first batch.
    """
    total = trainer.max_steps if trainer.max_steps > 0 else math.inf
    if trainer.max_epochs > 0 and math.isfinite(trainer.num_training_batches):
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        total = min(total, steps * trainer.max_epochs)
    return total
