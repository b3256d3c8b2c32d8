"""The progress bar of a run."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Lightning's bar: "Training" where a run is counted in steps, and the cross entropy.

    Lightning's own would show such a run, which has no last epoch, as "Epoch 0/-2".
    """

    @classmethod
    def replace(cls, trainer: lightning.Trainer) -> None:
        """Puts this bar in place of Lightning's default one; any other is left as it is."""
        for i, callback in enumerate(trainer.callbacks):
            if type(callback) is RichProgressBar:
                trainer.callbacks[i] = cls()

    def _get_train_description(self, current_epoch: int) -> str:
        if (self.trainer.max_epochs or -1) < 0:
            return f"{'Training':{len(self.validation_description)}}"
        return super()._get_train_description(current_epoch)

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Metrics to show; the number of the run is in the name of its folder."""
        found: dict[str, Any] = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in found.items() if name != "v_num"}
