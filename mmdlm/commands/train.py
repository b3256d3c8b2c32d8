"""`mmdlm fit | validate | test`: Lightning's command line on our module and data."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence as Items
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mmdlm.training.checkpoints import find_last
from mmdlm.training.data import Data
from mmdlm.training.module import Module
from mmdlm.training.stop import StopBetweenSteps


class CLI(LightningCLI):
    """Lightning's CLI with the model's vocabulary and statistics taken from the data.

    Args:
        words: the subcommand and its options, as they were typed.
    """

    def __init__(self, words: Items[str]) -> None:
        self.words, self.stop = list(words), StopBetweenSteps()
        super().__init__(
            Module,
            Data,
            args=[_config(word, before) for word, before in zip(words, ["", *words], strict=False)],
            save_config_kwargs={"overwrite": True},
            # Our batches are already split over processes.
            trainer_defaults={"use_distributed_sampler": False, "callbacks": [self.stop]},
            # The module has its own settings of both; a second place would override `tune`.
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "mmdlm"},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands that our module has steps for."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what only the data can know."""
        parser.link_arguments("data.words", "model.words", apply_on="instantiate")
        parser.link_arguments("data.statistics", "model.statistics", apply_on="instantiate")

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
    with warnings.catch_warnings():
        # Lightning would rather read sys.argv itself; ours also holds names of configs.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        CLI(args)


def _config(argument: str, before: str) -> str:
    if before not in ("-c", "--config"):
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
