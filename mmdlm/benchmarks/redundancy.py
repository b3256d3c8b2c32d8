"""`mmdlm bench redundancy`: where image tokens are redundant, by how a model was made."""

from __future__ import annotations

import json
from collections.abc import Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from mmdlm.atomic import write_text
from mmdlm.benchmarks import redundancy_report, report
from mmdlm.benchmarks.answers import asked
from mmdlm.benchmarks.bootstrap import resampled
from mmdlm.benchmarks.budgets import ALL, Way, ways
from mmdlm.benchmarks.captions import SEED, drawn
from mmdlm.benchmarks.pair import START, pair
from mmdlm.benchmarks.redundancy_report import LONG, SHORT, Measured, Recovered
from mmdlm.benchmarks.speed import threads
from mmdlm.checkpoint import load
from mmdlm.data.collate import batch, collate
from mmdlm.data.scenes import Scenes
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.pruning import option
from mmdlm.messages import Example
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import fill

GRAMMAR = ("a", ",", "and")
"""Words of a list of three shapes that do not depend on the image."""
BATCH = 32


@dataclass(frozen=True)
class Task:
    """Questions with one answer each.

    Args:
        name: `LONG` or `SHORT`.
        examples: one turn each.
        rows: number of the image of each.
        steps: of the decode, a divisor of the canvas.
    """

    name: str
    examples: list[Example]
    rows: np.ndarray
    steps: int


def tasks(count: int) -> list[Task]:
    """Captions of three shapes (14 words, two tokens per step), and one-word answers.

    Args:
        count: images of each.
    """
    long = drawn(Scenes(objects=(3,), seed=SEED, count=count, questions=0), count)
    images = drawn(Scenes(seed=SEED, count=count, questions=2, caption=False), count)
    short = [replace(one, branches=(branch,)) for one in images for branch in one.branches]
    rows = np.arange(count)
    return [Task(LONG, long, rows, 10), Task(SHORT, short, rows.repeat(2), 4)]


def wanted(model: MultimodalDLM, task: Task) -> tuple[Tensor, Tensor]:
    """Reference canvases int64 [n G], and where [n G] their words depend on the image."""
    length = task.examples[0].turns[0].length
    ids = [model.tokenizer.encode(one.turns[0].answer) for one in task.examples]
    end = model.spec.eos_id
    canvas = torch.tensor([[*each, *[end] * (length - len(each))] for each in ids])
    grammar = torch.tensor([end, *(model.tokenizer.id(word) for word in GRAMMAR)])
    return canvas, ~torch.isin(canvas, grammar)


def measure(
    model: MultimodalDLM, name: str, budgets: Items[float], count: int
) -> tuple[list[Measured], list[Recovered]]:
    """What every way does to the answers of a model, and what later steps recover.

    Args:
        model: it prunes nothing afterwards.
        name: of the model.
        budgets: shares of the image tokens computed.
        count: images per task.
    """
    found, recovered = [], []
    tokens = image_tokens(model, tasks(1)[0].examples[0])
    for task in tasks(count):
        given = (tokens, task.steps, len(model.backbone.blocks))
        jobs = [(1.0, ALL), *((budget, way) for budget in budgets for way in ways(budget, *given))]
        held: dict[Hashable, Tensor] = {}
        for budget, way in track(jobs, description=f"{name}, {task.name}", transient=True):
            sums = answered(model, task, way, held)
            found.append(Measured(name, task.name, budget, way.name, way.spent, *sums))
        if task.name == LONG:
            recovered += information(model, name, task, budgets)
    option.apply(model, None)
    return found, recovered


def image_tokens(model: MultimodalDLM, example: Example) -> int:
    """Embeddings of an image."""
    option.apply(model, None)
    return int(model.embed(model.processor.pack([example]).prompts).is_medium.sum())


def answered(
    model: MultimodalDLM, task: Task, way: Way, held: dict[Hashable, Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap values of the share of right words, and of the share of right answers.

    Only words that depend on the image count.

    Args:
        model: decodes with the same number of tokens in each step.
        task: what is asked.
        way: how image tokens are reduced.
        held: whole embeddings of images by content, which are used and added to.
    """
    option.apply(model, way.method)
    features = held if model.pruner is None else None
    examples = [one for sample in task.examples for one in asked(sample)]
    strategies = [TopK(steps=task.steps), *model.strategies]
    filled = fill(model, examples, strategies, batch_size=BATCH, seed=0, features=features)
    canvas, counts = wanted(model, task)
    same = torch.tensor([one.tokens for one in filled]) == canvas
    sums = torch.stack([(same & counts).sum(1), counts.sum(1), same.all(1)], 1)
    sums = np.column_stack([sums.numpy(), np.ones(len(sums))]).astype(float)
    return tuple(_shares(sums[:, i : i + 2], task.rows) for i in (0, 2))


def _shares(sums: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The share of [n 2] hits and cases, then those of its resamples."""
    value = _share
    return np.concatenate([[value(sums.sum(0))], resampled(sums, value, rows)])


def _share(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1])


@torch.inference_mode()
def information(
    model: MultimodalDLM, name: str, task: Task, budgets: Items[float]
) -> list[Recovered]:
    """The share of the image's information that each step has after pruning before the model.

    In step t of T the canvas holds the reference but for 1 - t / T of its tokens, the same ones for
    every model. Masked words that the model predicts then are counted with all image tokens,
    without any, and with a share of them (DivPrune). What the image adds is the difference of the
    first two; some tokens add a part of it.

    Args:
        model: predicts.
        name: of the model.
        task: with long answers.
        budgets: shares of the image tokens that stay.
    """
    canvas, counts = wanted(model, task)
    order = (
        torch.rand(canvas.shape, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1)
    )
    methods = (None, None, *(f"divprune@{budget}" for budget in budgets))
    right = np.zeros((len(methods), task.steps, len(canvas)))
    cases = np.zeros(right.shape[1:])
    for i in range(0, len(canvas), BATCH):
        part = slice(i, i + BATCH)
        for case, method in enumerate(methods):
            option.apply(model, method)
            sequence = _sequence(model, task.examples[part])
            if case == 1:  # without the image
                sequence = replace(sequence, mask=sequence.mask & ~sequence.is_medium)
            for step in range(task.steps):
                is_open = order[part] >= step * canvas.shape[1] // task.steps
                hits = _predicted(model, sequence, is_open) == canvas[part]
                right[case, step, part] = (hits & is_open & counts[part]).sum(1)
                cases[step, part] = (is_open & counts[part]).sum(1)
    return [
        Recovered.of(name, budget, right[[0, case, 1]], cases, task.rows)
        for case, budget in enumerate(budgets, 2)
    ]


def _sequence(model: MultimodalDLM, examples: list[Example]) -> Any:
    """Prompts with reference answers; canvases of one length end every row."""
    zeros = torch.zeros(len(examples), dtype=torch.long)
    return batch(model, collate(model.processor, examples, zeros, zeros.double())).sequence


def _predicted(model: MultimodalDLM, sequence: Any, is_open: Tensor) -> Tensor:
    """Most probable tokens [B G] of answers whose open positions [B G] are masked."""
    tokens, size = sequence.tokens.clone(), is_open.shape[1]
    tokens[:, -size:] = tokens[:, -size:].masked_fill(is_open, model.spec.mask_id)
    at = torch.zeros_like(sequence.mask)
    at[:, -size:] = True
    logits = model.logits_at(sequence.with_tokens(tokens), at)
    logits[:, model.spec.mask_id] = -torch.inf
    return logits.argmax(-1).view(is_open.shape)


def bench_redundancy(
    out: Path = Path("redundancy"),
    steps: int = 600,
    scenes: int = 12,
    count: int = 150,
    keep: list[float] = (0.5, 0.25),
    seed: int = 0,
) -> int:
    """Compare how a masked-diffusion model from scratch and one from an AR model lose image tokens.

    mmdlm bench redundancy --out redundancy

    Trains both with the same budget, or takes them from --out; the bundled model is the third. All
    answer with all image tokens, and with about the same part of them computed over layers and
    steps: pruned before the model, in the first step, late, or progressively, or skipping layers.
    Writes tables, redundancy.json and redundancy.png. About 20 minutes on one core.

    Args:
        out: folder of checkpoints and results.
        steps: training steps of each model.
        scenes: drawn scenes per step, each with a caption and a question.
        count: images per task.
        keep: shares of the image tokens that are computed.
        seed: of training.
    """
    for name, value in (("steps", steps), ("scenes", scenes), ("count", count)):
        if value < 2:
            raise ValueError(f"{name} is {value}, expected at least 2")
    console = report.terminal()
    with threads(1):
        models = pair(out, steps, scenes, seed, lambda line: console.print(line, markup=False))
        models["bundled"] = load(START, device="cpu", dtype="float32")
        found, recovered = [], []
        for name, model in models.items():
            more = measure(model, name, keep, count)
            found, recovered = found + more[0], recovered + more[1]
    for each in redundancy_report.tables(found, recovered):
        console.print(each)
    made = {"steps": steps, "scenes": scenes, "count": count, "seed": seed}
    results = redundancy_report.as_json(found, recovered)
    write_text(out / "redundancy.json", json.dumps(made | results, indent=1))
    redundancy_report.draw(found, recovered, out / "redundancy.png")
    console.print(f"written to {out}", markup=False)
    return 0
