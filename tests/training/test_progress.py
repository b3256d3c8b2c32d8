"""The progress bar names what a run is counted in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar

from mmdlm.training.progress import Progress


@pytest.mark.parametrize(
    ("epochs", "shown"), [(-1, "Training"), (None, "Training"), (3, "Epoch 0/2")]
)
def test_a_run_of_steps_has_no_last_epoch(epochs: int | None, shown: str) -> None:
    bar = Progress()
    bar._trainer = SimpleNamespace(max_epochs=epochs)
    assert bar._get_train_description(0).strip() == shown


def test_only_the_default_bar_is_replaced() -> None:
    class Own(RichProgressBar):
        """A bar of the user."""

    kept = [Own(), TQDMProgressBar(), ModelCheckpoint()]
    trainer = SimpleNamespace(callbacks=[*kept, RichProgressBar()])
    Progress.replace(trainer)
    assert trainer.callbacks[:3] == kept
    assert type(trainer.callbacks[3]) is Progress
