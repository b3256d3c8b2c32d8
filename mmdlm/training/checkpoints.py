"""Checkpoints of a run: written as a whole, also of the last step, and found again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mmdlm.atomic import replacing
from mmdlm.loading.ckpt import check_whole, newest_whole

SUFFIX = ModelCheckpoint.FILE_EXTENSION
LAST = ModelCheckpoint.CHECKPOINT_NAME_LAST
FOLDER = "checkpoints"  # of a run, where its ModelCheckpoint has no dirpath


class NotSavedError(OSError):
    """A checkpoint could not be written."""


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, flushes it and renames it.

    Lightning writes to $TMPDIR and moves the file, which is a copy where that is another disk: a
    kill leaves half a checkpoint, and a small $TMPDIR ends the run.

    Attributes:
        saved: the checkpoint that this process wrote last.
    """

    saved: Path | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint; the one that was there is kept if that fails.

        Raises:
            NotSavedError: the disk is full or the file cannot be written.
        """
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            with replacing(path) as new, new.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            cause = system_error(error)
            if cause is None:
                raise
            step = checkpoint.get("global_step")
            raise NotSavedError(self._message(path, step, cause)) from error
        self.saved = path

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Reads a checkpoint.

        Raises:
            FileNotFoundError: there is no such file.
            DamagedError: the file is cut short; the error names the newest whole one beside it.
        """
        if is_local(path):
            check_whole(Path(path))
        return super().load_checkpoint(path, *args, **options)

    def _message(self, path: Path, step: int | None, cause: OSError) -> str:
        folder = next(each for each in path.absolute().parents if each.is_dir())
        room = shutil.disk_usage(folder).free / 2**20
        kept = self.saved or newest_whole(path.parent.glob("*" + SUFFIX))
        remedy = f"resume with --ckpt_path {kept}" if kept else "start again"
        return (
            f"the checkpoint of step {step} could not be written to {path}: {cause.strerror} "
            f"({room:.0f} MiB free there); earlier checkpoints are unchanged; make room, then "
            f"{remedy}"
        )


class KeepLast(Callback):
    """Lets last.ckpt hold the last step of a run, however the run ends."""

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Writes last.ckpt again where the last step is not one of the steps that are saved."""
        for each in trainer.checkpoint_callbacks:
            wanted = isinstance(each, ModelCheckpoint) and each.save_last and each.dirpath
            if not wanted or trainer.fast_dev_run or trainer.global_step == 0:
                continue
            if getattr(each, "_last_global_step_saved", None) == trainer.global_step:
                continue
            path = each.last_model_path or os.path.join(each.dirpath, LAST + SUFFIX)
            if os.path.islink(path):  # save_last: link
                os.unlink(path)
            each.last_model_path = path  # part of what is saved
            trainer.save_checkpoint(path, each.save_weights_only)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Lets a stopped run save its step, and one without room not try again."""
        savers = [each for each in trainer.checkpoint_callbacks if hasattr(each, "dirpath")]
        if isinstance(exception, NotSavedError):
            for each in savers:
                each.save_on_exception = False
        elif isinstance(exception, SIGTERMException) and not any(
            each.save_on_exception for each in savers
        ):
            for each in savers[:1]:
                each.save_on_exception = True


def is_local(path: str | Path) -> bool:
    """Whether a path is of this machine and not a URL such as s3://bucket/run."""
    return "://" not in str(path)


def system_error(error: BaseException | None) -> OSError | None:
    """The error of the system over which torch raised another one; None if there is none."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__context__
    return error


def find_last(trainer: lightning.Trainer) -> Path:
    """The checkpoint that `--ckpt_path last` means: the newest last*.ckpt of the run's folders.

    Args:
        trainer: a trainer that has not run yet.

    Raises:
        FileNotFoundError: there is none; the error names the folders, and the newest whole
            checkpoint of other versions of the run.
    """
    places = folders(trainer)
    found = [file for place in places for file in place.glob(f"{LAST}*{SUFFIX}")]
    if found:
        return max(found, key=lambda file: file.stat().st_mtime)
    near = [
        file
        for place in places
        for pattern in (place.glob("*"), place.parent.parent.glob(f"*/{FOLDER}/*"))
        for file in pattern
        if file.suffix == SUFFIX
    ]
    other = newest_whole(near)
    hint = f"the newest one near is {other}: give --ckpt_path {other}; or" if other else "so"
    raise FileNotFoundError(
        f"--ckpt_path last: no {LAST}{SUFFIX} in {', '.join(map(str, places)) or 'any folder'}; "
        f"{hint} leave --ckpt_path out to start anew"
    )


def folders(trainer: lightning.Trainer) -> list[Path]:
    """Folders of the checkpoints of a run that has not begun, as Lightning chooses them."""
    root = Path(trainer.default_root_dir)
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version
        version = version if isinstance(version, str) else f"version_{version}"
        root = Path(logger.save_dir or root) / str(logger.name) / version
    savers = (each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint))
    return [Path(each.dirpath or root / FOLDER) for each in savers]
