"""What our batches, weights and checkpoints need from Lightning's strategies."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from mmdlm.atomic import replacing_folder
from mmdlm.loading.ckpt import check_whole
from mmdlm.training.checkpoints import KeepLast, WholeFileIO
from mmdlm.training.sharding import add_missing

UNUSED = "find_unused_parameters"


def prepare(trainer: lightning.Trainer, model: nn.Module) -> None:
    """Adapts a trainer that has not run yet.

    Checkpoints are written whole or not at all, and read only if they are whole, unless the trainer
    has its own way. The last one is saved before other callbacks end the run. Processes do not wait
    for the gradients of an encoder whose modality a batch lacks.

    Args:
        trainer: changed in place.
        model: with encoders by modality.

    Raises:
        ValueError: a callback averages weights that are split over processes.
    """
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeFileIO()
    # An averaging callback puts the averaged weights in place of the trained ones at the end.
    trainer.callbacks.sort(key=lambda each: not isinstance(each, KeepLast))
    if isinstance(strategy, ModelParallelStrategy) and any(
        isinstance(each, WeightAveraging) for each in trainer.callbacks
    ):
        raise ValueError(
            "trainer.callbacks: weights that ModelParallelStrategy splits cannot be averaged; "
            "leave the averaging out, or use the strategy ddp"
        )
    has_encoder = any(
        p.requires_grad for part in (model.encoders, model.adapters) for p in part.parameters()
    )
    if isinstance(strategy, DDPStrategy) and has_encoder:
        strategy._ddp_kwargs.setdefault(UNUSED, True)
    if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
        strategy.save_checkpoint = partial(save_folder, strategy)
    if isinstance(strategy, ModelParallelStrategy):
        strategy.load_checkpoint = partial(load_whole, strategy)


def save_folder(
    strategy: ModelParallelStrategy,
    checkpoint: dict[str, Any],
    path: str | Path,
    storage_options: Any = None,
) -> None:
    """Writes a checkpoint of several files, called in all processes, so that it is whole or absent.

    Args:
        strategy: writes the files.
        checkpoint: its contents.
        path: folder to write; the one that was there is kept until the new one is complete.
        storage_options: see `ModelParallelStrategy.save_checkpoint`.
    """
    path = Path(strategy.broadcast(path))
    if strategy.global_rank == 0 and path.is_file():
        path.unlink()  # of a run that was not split
    for state in checkpoint.get("optimizer_states", ()):
        add_missing(state, strategy.model)
    with replacing_folder(path) if strategy.global_rank == 0 else nullcontext() as new:
        new = strategy.broadcast(new)
        type(strategy).save_checkpoint(strategy, checkpoint, new, storage_options)
        strategy.barrier()
    strategy.barrier()
    if isinstance(strategy.checkpoint_io, WholeFileIO):
        strategy.checkpoint_io.saved = path


def load_whole(
    strategy: ModelParallelStrategy, path: str | Path, weights_only: bool | None = None
) -> dict[str, Any]:
    """Reads a checkpoint of one or several files, called in all processes.

    Args:
        strategy: reads the files.
        path: file or folder.
        weights_only: see `ModelParallelStrategy.load_checkpoint`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        DamagedError: a file is missing or cut short; the error names the newest whole checkpoint.
    """
    path = Path(strategy.broadcast(path))
    check_whole(path)
    return type(strategy).load_checkpoint(strategy, path, weights_only)
