"""`mmdlm predict`: the answers of a model to the questions of a data set, as JSON Lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from mmdlm.atomic import replacing
from mmdlm.benchmarks.answers import answer
from mmdlm.training.data import Rows

FILE = "predictions.jsonl"


class WriteAnswers(Callback):
    """Answers the questions of `mmdlm predict`, one line each: data, question, target, answer.

    The file is `predictions.jsonl` in the folder of the run.
    """

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Rows,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answers the rows of a batch."""
        name, samples = outputs.name, outputs.examples
        turns = [turn for sample in samples for turn in sample.turns]
        for turn, text in zip(turns, answer(pl_module.model, samples).texts, strict=True):
            line = {"data": name, "question": turn.prompt, "target": turn.answer}
            self.lines.append({**line, "answer": text})

    def on_predict_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Writes the file, whole or not at all."""
        path = Path(trainer.log_dir or trainer.default_root_dir) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new, new.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in self.lines)
        print(f"{path}: {len(self.lines)} answers", file=sys.stderr)
