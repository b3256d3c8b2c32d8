"""`mmdlm fit | validate | test | predict`: Lightning's command line on our module and data."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence as Items
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mmdlm.training.data import Data
from mmdlm.training.module import Module


class CLI(LightningCLI):
    """Lightning's CLI with the model's vocabulary and statistics taken from the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what only the data can know."""
        parser.link_arguments("data.words", "model.words", apply_on="instantiate")
        parser.link_arguments("data.statistics", "model.statistics", apply_on="instantiate")


def run(args: Items[str]) -> None:
    """Runs a Lightning command.

    Args:
        args: the subcommand and its options; `-c train/tiny` finds ./configs/train/tiny.yaml, else
            the packaged copy.
    """
    args = [_config(a, before) for a, before in zip(args, ["", *args], strict=False)]
    with warnings.catch_warnings():
        # Lightning would rather read sys.argv itself; ours also holds names of configs.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        CLI(
            Module,
            Data,
            args=args,
            save_config_kwargs={"overwrite": True},
            # Our batches are already split over processes.
            trainer_defaults={"use_distributed_sampler": False},
            # The module has its own settings of both; a second place would override `tune`.
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "mmdlm"},
        )


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
