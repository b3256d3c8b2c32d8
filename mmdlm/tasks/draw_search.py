"""Draw the best of many images: those with low scores end early."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmdlm.decoding.strategy import Strategy
from mmdlm.model import MultimodalDLM
from mmdlm.search.hierarchical import Branch, hierarchical
from mmdlm.tasks.answer import answer
from mmdlm.tasks.drawings import Drawing, Wanted, drawings, preview, request, stream

Score = Callable[[list[Image.Image], str], list[float]]
"""Scores of images of a text, which may be grey where they are not drawn yet; higher is better."""
QUESTION = 'Does this image show "{text}"? Answer with a single word: Yes or No.'
CHOICES = ("Yes", "No")


def search(
    model: MultimodalDLM,
    wanted: Wanted,
    strategies: list[Strategy],
    best_of: int,
    count: int,
    score: Score | None = None,
    branch: Branch | None = None,
) -> list[Drawing]:
    """The best of several images of one text, best first.

    Source: dMLLM-TTS scores images by what the model itself answers to a question about them; see
    `mmdlm.search.hierarchical` for the search.

    Args:
        model: the model.
        wanted: the image.
        strategies: of every decode.
        best_of: images that are begun, with the seeds from that of `wanted` on.
        count: images that are returned.
        score: see `Score`; None: `judge`.
        branch: see `mmdlm.search.hierarchical`.
    Raises:
        ValueError: there is no score, and the model cannot answer questions about images.
    """
    begin, grid = time.perf_counter(), tuple(wanted.codes.shape)
    given: dict[str, Any] = request(model, [wanted], strategies)
    scored = score or judge(model)

    def values(canvases: Tensor) -> list[float]:
        images = [preview(model, canvas.tolist(), grid) for canvas in canvases]
        return scored(images, wanted.text)

    found = hierarchical(
        model,
        **given,
        steps=max(getattr(one, "steps", None) or 0 for one in strategies) or given["length"],
        score=values,
        n=best_of,
        keep=min(best_of, max(count, 4)),
        branch=branch,
        seeded=lambda seed: stream(model, wanted.seed + seed),
    )
    seconds = time.perf_counter() - begin
    best = found.answers[:count]
    return drawings(model, [wanted] * len(best), best, seconds)


def judge(model: MultimodalDLM) -> Score:
    """Scores by the model itself: its probability of "Yes" to `QUESTION`, in [0, 1].

    Args:
        model: a model that answers questions about images.
    """

    @torch.inference_mode()
    def score(images: list[Image.Image], text: str) -> list[float]:
        asked = {"choices": CHOICES, "details": True}
        found = answer(model, QUESTION.format(text=text), image=images, **asked)
        return [each.probabilities[CHOICES[0]] for each in found]

    return score
