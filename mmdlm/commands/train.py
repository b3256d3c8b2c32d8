"""`mmdlm fit | validate | test | predict`: Lightning's command line on our module and data."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence as Items
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_module

from mmdlm.commands.estimate import print_estimate
from mmdlm.commands.finetune import SHORT, expand
from mmdlm.commands.own_data import How, check_first
from mmdlm.commands.predict import WriteAnswers
from mmdlm.data.conversations import collecting
from mmdlm.training.checkpoints import find_last
from mmdlm.training.data import Data
from mmdlm.training.module import Module
from mmdlm.training.new_model import NewModel
from mmdlm.training.optimizer import AdamW, Schedule
from mmdlm.training.progress import Progress
from mmdlm.training.stop import StopBetweenSteps

CHECK = (
    "what fit checks first, see mmdlm data check: all; auto, all texts, and media for half a "
    "minute per data set; texts; or none"
)


ESTIMATE = (
    "print the memory of a training step of fit with all weights, LoRA, and LoRA on 8 bits, and "
    "train nothing"
)


class CLI(LightningCLI):
    """Lightning's CLI with the model's vocabulary and statistics taken from the data.

    Args:
        words: the subcommand and its options, as they were typed.
    """

    def __init__(self, words: Items[str]) -> None:
        self.words, self.stop = list(words), StopBetweenSteps()
        args = expand(words)
        super().__init__(
            Module,
            Data,
            args=[_config(word, before) for word, before in zip(args, ["", *args], strict=False)],
            save_config_kwargs={"overwrite": True},
            # Our batches are already split over processes.
            trainer_defaults={"use_distributed_sampler": False, "callbacks": [self.stop]},
            # The module has its own settings of both; a second place would override `tune`.
            auto_configure_optimizers=False,
            parser_kwargs={name: {"exit_on_error": False} for name in self.subcommands()}
            | {"prog": "mmdlm", "exit_on_error": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what only the data can know."""
        parser.link_arguments("data.words", "model.words", apply_on="instantiate")
        parser.link_arguments("data.train", "model.datasets", apply_on="instantiate")
        parser.link_arguments("data.statistics", "model.data_statistics", apply_on="instantiate")
        parser.add_argument("--check", type=How, default="auto", help=CHECK)
        parser.add_argument("--estimate", action="store_true", help=ESTIMATE)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """The trainer, with our progress bar."""
        trainer = super().instantiate_trainer(**kwargs)
        Progress.replace(trainer)
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: Items[str]) -> None:
        """Parses the words; an error is one line without the list of all options.

        Raises:
            ValueError: an option is unknown, or its value is not valid.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise ValueError(explained(str(error))) from error

    def before_predict(self) -> None:
        """Has the answers written."""
        self.trainer.callbacks.append(WriteAnswers())

    def instantiate_classes(self) -> None:
        """Builds everything; before a training all rows of the data are checked."""
        how = self.config["fit"].check if self.subcommand == "fit" else "none"
        if how == "none":
            super().instantiate_classes()
            return
        with collecting() as rejected:
            try:
                super().instantiate_classes()
            except Exception:
                if rejected:
                    check_first((), None, rejected, "none")
                raise
        if self.trainer.is_global_zero:
            data = (*self.datamodule.train.values(), *self.datamodule.val.values())
            check_first(data, self.model.model, rejected, how)
        elif rejected:  # the first process lists them
            raise rejected[0][1]

    def before_fit(self) -> None:
        """Prints the memory of a step instead of training, if asked to."""
        if self.config["fit"].estimate:
            if self.trainer.is_global_zero:
                print_estimate(self.model, self.datamodule, self.trainer)
            raise SystemExit(0)

    def _parse_ckpt_path(self) -> None:
        """Reads no settings: our checkpoints hold none, and a damaged one is reported later."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command so that a signal ends it with 128 plus its number."""
        options = self.config_init[subcommand]
        if options.get("ckpt_path") == "last":
            options["ckpt_path"] = str(find_last(self.trainer))
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:
            number = self.stop.received or signal.SIGTERM
            if isinstance(stop.__context__, KeyboardInterrupt):  # before the first step
                number = signal.SIGINT
            elif not isinstance(stop, SIGTERMException):
                raise
            if not self.trainer.is_global_zero:  # an error here would kill the first process
                raise SystemExit(0) from stop
            print(self._farewell(subcommand, number), file=sys.stderr, flush=True)
            raise SystemExit(128 + number) from stop

    def _farewell(self, subcommand: str, number: signal.Signals) -> str:
        """Why the command ended, and the command that goes on where it stopped."""
        trainer, words = self.trainer, list(self.words)
        said = f"mmdlm: stopped by {number.name}"
        if subcommand != "fit":
            return said
        saved = getattr(trainer.strategy.checkpoint_io, "saved", None)
        if saved is None:
            done = "nothing new was saved; run it again with"
        else:
            done = f"step {trainer.global_step} of {trainer.max_steps} is saved; resume with"
            words = [*_without(words, "--ckpt_path"), "--ckpt_path", os.path.relpath(saved)]
        return f"{said}; {done}\n  mmdlm {shlex.join(words)}"


CONFIG = ("-c", "--config")
NOISE = (
    # Lightning would rather read sys.argv itself; ours also holds names of configs.
    "LightningCLI's args parameter",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # within Lightning
    r"Found \d+ module\(s\) in eval mode",  # frozen parts, on purpose
    # Steps are counted over epochs, so nothing is missing from the logs.
    "The number of training batches .* is smaller than the logging interval",
    "The '.*_dataloader' does not have many workers",  # it names an option that we do not have
    # Weights are split by ModelParallelStrategy only, with which averaging is refused.
    "You're using the WeightAveraging callback with a model that overrides the configure_model",
)
"""Beginnings of warnings that do not apply, or that a user can do nothing about."""


def _is_useful(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning is neither advertising nor about devices it did not find."""
    said = record.getMessage()
    return not any(word in said for word in ("litlogger", "litmodels", "TPU available: False"))


def _without(words: Items[str], option: str) -> list[str]:
    """Words of a command without an option and its value."""
    kept, skip = [], False
    for word in words:
        if not skip and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = not skip and word == option
    return kept


def run(args: Items[str]) -> None:
    """Runs a Lightning command.

    Args:
        args: the subcommand and its options; `-c train/tiny` finds ./configs/train/tiny.yaml, else
            the packaged copy.

    Raises:
        SystemExit: with 143 after SIGTERM and 130 after SIGINT; the command that resumes is on
            stderr.
    """
    if args[:1] == ["fit"] and {"-h", "--help"} & set(args):
        print(SHORT)
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message)
        logger = rank_zero_module.log
        logger.addFilter(_is_useful)
        sys.path += [folder for folder in class_folders(args) if folder not in sys.path]
        try:
            CLI(args)
        finally:
            logger.removeFilter(_is_useful)


def class_folders(args: Items[str]) -> list[str]:
    """Folders where classes that a config names are looked for: here, and beside the configs.

    They come after all installed packages, so a file here never takes the place of one.
    """
    names = [_config(word, before) for word, before in zip(args, ["", *args], strict=False)]
    configs = [n for n, before in zip(names, ["", *args], strict=False) if before in CONFIG]
    return list(dict.fromkeys([os.getcwd(), *(str(Path(c).resolve().parent) for c in configs)]))


def explained(error: str) -> str:
    """An error of the parser, with what to do where that is known."""
    unknown = re.search(r"(?:option '|[Uu]nrecognized arguments: --)model\.(\w+)", error)
    moved = [
        f"model.{part}.{field.name}"
        for part, kind in (("optimizer", AdamW), ("schedule", Schedule), ("blueprint", NewModel))
        for field in fields(kind)
        if unknown and field.name == unknown[1]
    ]
    if moved:
        part = " (of a new model; it has no effect beside source)" * ("blueprint" in moved[0])
        return f"there is no option model.{unknown[1]}; it is {moved[0]}{part}"
    if 'Parser key "model.blueprint' in error:
        return f"{error}; beside model.source it has no effect, so leave one of them out"
    absent = re.search(r"No module named '([\w.]+)'", error)
    if absent and absent[1].partition(".")[0] not in ("mmdlm", "encoders", "adapters"):
        return (
            f"{error}; looked for it among installed packages, in {os.getcwd()} and beside the "
            f"config; put {absent[1].replace('.', '/')}.py there, or set PYTHONPATH"
        )
    return error


def _config(argument: str, before: str) -> str:
    if before not in CONFIG:
        return argument
    return str(find_config(argument))


def find_config(name: str) -> Path:
    """The YAML file of a config name: a path, ./configs/<name>.yaml, or the packaged copy.

    Raises:
        FileNotFoundError: there is none; the message lists what exists.
    """
    import mmdlm

    package = Path(mmdlm.__file__).parent
    roots = [Path("configs"), package / "configs", package.parent / "configs"]
    candidates = [Path(name), *(root / f"{name}.yaml" for root in roots)]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(
        {str(p.relative_to(r).with_suffix("")) for r in roots for p in r.glob("*/*.yaml")}
    )
    raise FileNotFoundError(f"no config {name!r}; a file path or one of: {', '.join(known)}")


if __name__ == "__main__":
    run(sys.argv[1:])
