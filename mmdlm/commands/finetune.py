"""`mmdlm fit --source MODEL --data FILE`: short options, and the scores before and after."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import yaml
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from mmdlm.benchmarks.answers import answer
from mmdlm.benchmarks.metrics import same
from mmdlm.data.conversations import Conversations
from mmdlm.data.dataset import Dataset
from mmdlm.data.episodes import Episodes, is_robot
from mmdlm.data.formats import of
from mmdlm.messages import Example
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.act import Policy

SHORT = """Short options beside --source and --data:
  --source MODEL       the model to train further: a bundled name, folder or hub id
  --data FILE          your data (mmdlm data formats lists the forms); given several times, mixed
  --val FILE           held-out data; by default a tenth of the rows of --data
  --prompt TEXT        instruction for media that come with a text alone
  --length N           canvas of the answers in tokens; by default that of the longest answer
  --batch-size N       rows of each file per step
  --steps N, --epochs N    how long to train
  --out DIR            folder of the run
"""
USE = {
    "caption": "mmdlm caption IMAGE --model {}",
    "transcribe": "mmdlm transcribe CLIP --model {}",
    "answer": 'mmdlm answer IMAGE --question "..." --model {}',
    "generate": 'mmdlm generate "..." --model {}',
    "act": "mmdlm act --sim SIMULATOR --model {}",
}
"""The command that uses a model, by task."""


def expand(words: Items[str]) -> list[str]:
    """The words of a command with short options replaced by Lightning's.

    Args:
        words: subcommand and options as they were typed.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file has no known format, or a short option has no effect.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", action="append")
    for name in ("--source", "--val", "--prompt", "--length", "--batch-size", "--out"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--epochs", type=int)
    given, rest = parser.parse_known_args(list(words))
    if given.data and all(map(is_settings, given.data)):  # Lightning's --data settings.yaml
        rest += [word for path in given.data for word in ("--data", path)]
        given.data = None
    rest += _data(given)
    if given.source is not None:
        rest.append(f"--model.source={given.source}")
    if given.steps is not None:
        rest += [f"--trainer.max_steps={given.steps}"]
    if given.epochs is not None:
        rest += ["--trainer.max_steps=-1", f"--trainer.max_epochs={given.epochs}"]
    if given.out is not None:
        rest.append(f"--trainer.logger.init_args.save_dir={given.out}")
    return rest


def is_settings(path: str) -> bool:
    """Whether a file holds settings of the data module, not data."""
    if not path.endswith((".yaml", ".yml")):
        return False
    found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return isinstance(found, dict) and "train" in found


def _data(given: argparse.Namespace) -> list[str]:
    """Lightning's options of the data sets."""
    if not given.data:
        for name in ("val", "prompt", "length"):
            if getattr(given, name) is not None:
                raise ValueError(f"--{name} has no effect without --data FILE")
        return [] if given.batch_size is None else [f"--data.batch_size={given.batch_size}"]
    options = {}
    if given.prompt is not None:
        options["prompt"] = given.prompt
    if given.length is not None:
        options["length"] = int(given.length)
    train = {_name(path, i): _recipe(path, options) for i, path in enumerate(given.data)}
    if given.val is not None:
        val = {_name(given.val, 0): _recipe(given.val, options)}
    else:
        val = {name: _split(recipe, "held_out") for name, recipe in train.items()}
        train = {name: _split(recipe, "train") for name, recipe in train.items()}
    return [
        f"--data.train={json.dumps(train)}",
        f"--data.val={json.dumps(val)}",
        f"--data.batch_size={given.batch_size or 16}",
    ]


def _name(path: str, number: int) -> str:
    """Name of a data set in logs."""
    return Path(path).stem.replace(".", "_") + (f"_{number}" if number else "")


def _recipe(path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Class and arguments of the data set of a file or folder."""
    if is_robot(Path(path)):
        if options:
            raise ValueError(f"--{min(options)} has no effect on the robot data in {path}")
        return {"class_path": "mmdlm.data.episodes.Episodes", "init_args": {"root": path}}
    kind = of(Path(path), options)
    where = f"{kind.__module__}.{kind.__name__}"
    return {"class_path": where, "init_args": {"path": path, **options}}


def _split(recipe: dict[str, Any], part: str) -> dict[str, Any]:
    """The training or the held-out part of a data set."""
    if "root" in recipe["init_args"]:
        part = {"held_out": "val"}.get(part, part)
        return {**recipe, "init_args": {**recipe["init_args"], "part": part}}
    init = {"dataset": recipe, "part": part}
    return {"class_path": "mmdlm.data.split.Split", "init_args": init}


@dataclass(frozen=True)
class Held:
    """Held-out questions of a run, and their answers before training.

    Args:
        samples: rows of held-out data.
        questions: what is asked, for the report.
        targets: the right answers.
        before: the model's answers before training.
    """

    samples: list[Example]
    questions: list[str]
    targets: list[str]
    before: list[str]


@dataclass(frozen=True)
class HeldChunks:
    """Held-out frames of robot data, and a policy's error before training.

    Args:
        observations: see `Policy.infer`.
        targets: [N K A] the actions that follow.
        before: error before training, see `chunk_error`.
    """

    observations: list[dict[str, Any]]
    targets: np.ndarray
    before: float


class Report(Callback):
    """Answers held-out questions before and after training, and writes the model as a folder.

    Of robot data it compares the actions that the policy predicts with the recorded ones.

    Args:
        rows: rows of held-out data that are answered; of robot data, frames.
        shown: examples that are shown side by side.
    """

    def __init__(self, rows: int = 64, shown: int = 3) -> None:
        self.rows, self.shown = rows, shown
        self.held: Held | None = None
        self.chunks: HeldChunks | None = None

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Says what is trained, and answers before training."""
        if not trainer.is_global_zero:
            return
        print(plan(trainer, module), file=sys.stderr)
        datasets = trainer.datamodule.val or trainer.datamodule.train
        robot = next((d for d in datasets.values() if isinstance(base(d), Episodes)), None)
        if robot is not None:
            self.chunks = held_chunks(module.model, robot, self.rows)
        data = next((d for d in datasets.values() if isinstance(base(d), Conversations)), None)
        if data is None:
            return
        samples = [
            data.sample(i, np.random.default_rng(i)) for i in range(min(self.rows, len(data)))
        ]
        turns = [turn for sample in samples for turn in sample.turns]
        questions = [turn.prompt for turn in turns]
        targets = [turn.answer for turn in turns]
        before = answer(module.model, samples).texts
        self.held = Held(samples, questions, targets, before)

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Answers after training; shows both, and writes the model."""
        if not trainer.is_global_zero or trainer.interrupted:
            return
        console = Console(file=sys.stderr, highlight=False)
        if self.held is not None:
            after = answer(module.model, self.held.samples).texts
            console.print(table(self.held, after, self.shown))
        if self.chunks is not None:
            after = chunk_error(module.model, self.chunks.observations, self.chunks.targets)
            count, chunk = self.chunks.targets.shape[:2]
            console.print(
                f"{count} held-out frames: the next {chunk} actions differ from the recorded ones "
                f"by {self.chunks.before:.1%} of their range before training, {after:.1%} after.",
                soft_wrap=True,
            )
        out = Path(trainer.log_dir or trainer.default_root_dir) / "model"
        use = module.write(out)
        other = "generate" if self.chunks is None else "act"
        task = next(iter(trainer.datamodule.tasks), other)
        command = USE.get(task, "mmdlm info {}").format(use)
        console.print(f"The model is in {out}. Use it:\n  {command}", soft_wrap=True)


def plan(trainer: lightning.Trainer, module: lightning.LightningModule) -> str:
    """How many parameters a run trains, and how often it sees each row."""
    sizes = [(each.numel(), each.requires_grad) for each in module.model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)
    said = f"{trained:,} of {total:,} parameters are trained ({trained / total:.1%})"
    summed = trainer.accumulate_grad_batches * trainer.world_size
    for name, data in trainer.datamodule.train.items():
        size = trainer.datamodule.batch_size[name] * summed
        said += f"; {name}: {len(data):,} rows, {size} per step"
        if trainer.max_steps > 0:
            said += f", each {trainer.max_steps * size / len(data):.3g} times"
    return said


def base(dataset: Dataset) -> Dataset:
    """The data set inside splits and other wrappers."""
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def held_chunks(model: MultimodalDLM, data: Dataset, count: int) -> HeldChunks:
    """Frames spread over robot data, and the policy's error on them.

    Args:
        model: the policy.
        data: wraps `Episodes`.
        count: number of frames.
    """
    places = np.unique(np.linspace(0, len(data) - 1, count).astype(int))
    samples = [data.sample(int(i), np.random.default_rng(int(i))) for i in places]
    observations = []
    for sample in samples:
        images, state = sample.media("image"), sample.media("state")
        seen = {"image": images[0] if len(images) == 1 else images} if images else {}
        seen |= {"state": state[0]} if state else {}
        observations.append(seen | {"prompt": sample.turns[0].prompt})
    targets = np.stack([sample.turns[0].answer for sample in samples])
    return HeldChunks(observations, targets, chunk_error(model, observations, targets))


def chunk_error(
    model: MultimodalDLM, observations: Items[dict[str, Any]], targets: np.ndarray, batch: int = 16
) -> float:
    """Mean difference of predicted and recorded actions, as a share of each number's range.

    Numbers that never change are left out.

    Args:
        model: the policy.
        observations: see `Policy.infer`.
        targets: [N K A] recorded actions.
        batch: observations per forward.
    """
    was = model.training
    model.eval()
    try:
        policy, found = Policy(model), []
        for i in range(0, len(observations), batch):
            found += policy.infer_batch(observations[i : i + batch])
    finally:
        model.train(was)
    span = np.ptp(targets, axis=(0, 1))
    off = np.abs(np.stack([each["actions"] for each in found]) - targets)
    return float((off[..., span > 0] / span[span > 0]).mean()) if span.any() else 0.0


def table(held: Held, after: Items[str], shown: int) -> Table:
    """Scores and some examples, before and after training."""
    exact = [
        sum(same(a, b) for a, b in zip(found, held.targets, strict=True)) / len(held.targets)
        for found in (held.before, after)
    ]
    grid = Table(title=f"{len(held.targets)} held-out answers", show_lines=True)
    for name in ("question", "right answer", "before training", "after training"):
        grid.add_column(name, overflow="fold")
    for row in zip(held.questions, held.targets, held.before, after, strict=True):
        if grid.row_count < shown:
            grid.add_row(*row)
    grid.add_row("exact", "", f"{exact[0]:.1%}", f"{exact[1]:.1%}")
    return grid
