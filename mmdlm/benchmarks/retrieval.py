"""`mmdlm bench retrieval`: how often a text finds its picture or recording, and back."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmdlm.benchmarks import report
from mmdlm.benchmarks.captions import SEED, drawn
from mmdlm.checkpoint import load
from mmdlm.data.formats import open_data
from mmdlm.data.scenes import Scenes
from mmdlm.messages import Example
from mmdlm.model import MultimodalDLM
from mmdlm.representation import similarity
from mmdlm.tasks.embed import embed

CUTOFFS = (1, 5, 10)


def recall(scores: Tensor, cutoff: int) -> float:
    """Share of the rows whose own column is among the best.

    Args:
        scores: [N N], the pairs on the diagonal; equal scores count against it.
        cutoff: number of best columns.
    """
    own = scores.diagonal()[:, None]
    better = (scores >= own).sum(1) - 1
    return float((better < cutoff).float().mean())


def pairs(examples: Items[Example]) -> tuple[list[Any], list[str]]:
    """The prompts of examples as conversations, and their answers, those with new answers only."""
    prompts, answers = [], []
    for example in examples:
        for messages in example.conversations:
            answer = messages[-1].parts[-1].value
            if answer not in answers:
                prompts.append(messages[:-1])
                answers.append(answer)
    return prompts, answers


def compare(
    model: MultimodalDLM, examples: Items[Example], batch_size: int = 32, **options: Any
) -> dict[str, float]:
    """Recall by direction and cutoff.

    Args:
        model: the model.
        examples: prompts with media, and text answers.
        batch_size: embedded together.
        **options: `pooling` and `masks` of `mmdlm.embed`.
    """
    prompts, answers = pairs(examples)
    media = embed(model, prompts, batch_size=batch_size, **options)
    texts = embed(model, text=answers, batch_size=batch_size, **options)
    media, texts = (x if x.ndim == 3 else x[:, None] for x in (media, texts))
    tables = {"text to media": similarity(texts, media), "media to text": similarity(media, texts)}
    return {
        f"{name}, recall@{cutoff}": recall(scores, cutoff)
        for name, scores in tables.items()
        for cutoff in CUTOFFS
    }


def bench_retrieval(
    model: str = "tiny",
    data: Path | None = None,
    count: int = 200,
    masks: int | None = None,
    pooling: Literal["mean", "text", "last"] = "mean",
    adapter: str | None = None,
    prune: str | None = None,
    device: str = "cpu",
) -> int:
    """Measures how often a text finds its picture or recording, and back.

    mmdlm fit -c train/retrieval
    mmdlm bench retrieval --model runs/retrieval/version_0/model

    Args:
        model: bundled name, folder or hub id.
        data: media with texts, see mmdlm data formats; by default new drawn scenes with captions.
        count: pairs with different texts, at most.
        masks: mask tokens per item, see mmdlm embed.
        pooling: see mmdlm embed.
        adapter: LoRA adapter of the model.
        prune: see mmdlm caption --prune.
        device: "cpu", "cuda" or "auto".
    """
    from rich.table import Table

    loaded = load(model, device=device, adapter=adapter, prune=prune)
    rows = Scenes(seed=SEED, questions=0) if data is None else open_data(data)
    rows.connect(loaded.processor, loaded.preset)
    examples = drawn(rows, count if data is None else min(count, len(rows)))
    options = {"masks": masks} if masks is not None else {"pooling": pooling}
    with torch.inference_mode():
        found = compare(loaded, examples, **options)
    table = Table(title=f"{len(pairs(examples)[1])} pairs, {model}", title_justify="left")
    table.add_column("")
    table.add_column("recall", justify="right")
    for name, value in found.items():
        table.add_row(name, f"{100 * value:.1f} %")
    report.terminal().print(table)
    return 0
