"""Answers to questions, in the model's own words or from fixed choices."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor

from mmdlm.decoding.preset import Choice
from mmdlm.layout import ANSWER, Row, Turn
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import (
    Answer,
    blank,
    check_batch_size,
    generate,
    listed,
    settings,
    shown,
    text_ids,
    words,
)
from mmdlm.tasks.request import Encoded, Request, check_kind


def answer(
    model: MultimodalDLM,
    question: str | list[str],
    image: Any = None,
    *,
    images: list[Any] | None = None,
    choices: list[str] | None = None,
    prompt: str | None = None,
    length: int | None = None,
    strategies: Choice = None,
    batch_size: int = 16,
    details: bool = False,
    seed: int | None = None,
) -> Any:
    """The answer to a question about a picture, or about nothing but itself.

    Several questions about one picture, one question about several pictures, or two lists of equal
    length give a list. A picture asked about several times is encoded once.

    Args:
        model: the model.
        question: one, or a list.
        image: see `mmdlm.caption`; None for a question without a picture.
        images: a list of pictures; the same as `image=[...]`.
        choices: texts of which the most probable is the answer, see `choose`; nothing is decoded,
            so `strategies` and `seed` have no effect.
        prompt: instruction around the question, with {question} in it; None for the checkpoint's
            own, or the bare question.
        length: tokens of the canvas; None for the checkpoint's own, else 32.
        strategies: a preset's name or a list, see `mmdlm.decode`; None for the checkpoint's own.
        batch_size: questions decoded together; it does not change the answers.
        details: return `mmdlm.tasks.generate.Answer` instead of text.
        seed: of strategies that draw random numbers.
    Raises:
        ValueError: lists of unequal length, or an image, question or choice is not valid.
    """
    if images is not None:
        if image is not None:
            raise ValueError("give image= or images=, not both")
        image = list(images)
    if image is not None:
        check_kind(model, "image")
    how = settings(model, "answer", prompt, length, strategies, needs_prompt=False)
    pattern = how.prompt or "{question}"
    if "{question}" not in pattern:
        raise ValueError(
            f"prompt {pattern!r} has no place for the question; write {{question}} where it goes"
        )
    canvas = blank(model, how.length)
    requests = [
        Request(pattern.replace("{question}", one), canvas, () if it is None else (("image", it),))
        for one, it in pairs(question, image)
    ]
    if choices is not None:
        own = (model.preset.get("answer") or {}).get("length")
        options = completed(model, choices, length, own)
        answers = choose(model, requests, choices, options, batch_size)
    else:
        answers = generate(model, requests, how.strategies, batch_size=batch_size, seed=seed)
    return shown(answers, isinstance(question, list) or isinstance(image, list), details)


def pairs(question: str | list[str], image: Any) -> list[tuple[str, Any]]:
    """Questions with the picture of each."""
    asked, seen = listed(question), listed(image)
    for one in asked:
        if not isinstance(one, str) or not one.strip():
            raise ValueError(f"question is {one!r}, expected text")
    if isinstance(question, list) and isinstance(image, list) and len(asked) != len(seen):
        raise ValueError(
            f"{len(asked)} questions and {len(seen)} images; give one of either, or as many"
        )
    count = max(len(asked), len(seen)) if asked and seen else 0
    return [(asked[i % len(asked)], seen[i % len(seen)]) for i in range(count)]


def completed(
    model: MultimodalDLM, choices: Items[str], length: int | None, own: int | None
) -> Tensor:
    """Token ids [O G] int64 of the choices, completed with end tokens to one canvas.

    Args:
        model: its tokenizer and end id.
        choices: at least two distinct texts.
        length: the caller's canvas; None for the checkpoint's, or one end token after the longest.
        own: the checkpoint's canvas.
    Raises:
        ValueError: a choice is empty, given twice, or longer than the caller's canvas.
    """
    if isinstance(choices, str) or len(choices) < 2 or len(set(choices)) < len(choices):
        raise ValueError(f"choices is {choices!r}, expected two or more distinct texts")
    ids = [text_ids(model, choice) for choice in choices]
    longest = max(len(one) for one in ids)
    if min(len(one) for one in ids) == 0:
        raise ValueError(f"choices {choices!r} hold an empty text")
    size = max(own or longest + 1, longest) if length is None else length
    if size < longest:
        raise ValueError(f"a choice has {longest} tokens, the canvas {size}; pass a larger length")
    table = torch.full((len(ids), size), model.spec.eos_id)
    for row, one in zip(table, ids, strict=True):
        row[: len(one)] = one
    return table


@torch.inference_mode()
def choose(
    model: MultimodalDLM,
    requests: Items[Request],
    choices: Items[str],
    options: Tensor,
    batch_size: int,
) -> list[Answer]:
    """The most probable choice of each request, from one forward per batch.

    The forward sees a canvas of masks. A choice scores the sum of the log probabilities of its
    tokens, completed with end tokens; a softmax over the choices gives their probabilities.

    Args:
        model: the model.
        requests: their canvases are not read.
        choices: O texts.
        options: [O G] int64, see `completed`.
        batch_size: requests per batch.
    """
    check_batch_size(batch_size)
    encoded = Encoded(model, requests)
    options = options.to(model.device)
    canvas = blank(model, options.shape[1])
    answers = []
    for start in range(0, len(requests), batch_size):
        group = requests[start : start + batch_size]
        media = encoded.take(group, range(start, start + len(group)))
        begin = time.perf_counter()
        rows = [
            Row(parts, (Turn(model.prompt(request.prompt), canvas),))
            for request, parts in zip(group, media.parts, strict=True)
        ]
        scored = _log_probabilities(model, rows, options)  # [B O G]
        chance = scored.sum(2).softmax(1)  # [B O]
        seconds = media.seconds + time.perf_counter() - begin
        for row, sure in zip(chance.tolist(), scored.exp().tolist(), strict=True):
            best = max(range(len(choices)), key=row.__getitem__)
            tokens = text_ids(model, choices[best]).tolist()
            step, sure = (0,) * len(tokens), tuple(sure[best][: len(tokens)])
            answers.append(
                Answer(
                    choices[best],
                    tuple(tokens),
                    1,
                    seconds,
                    sure,
                    step,
                    words(model, tokens, step, sure),
                    probabilities=dict(zip(choices, row, strict=True)),
                )
            )
    return answers


def _log_probabilities(model: MultimodalDLM, rows: list[Row], options: Tensor) -> Tensor:
    """[B O G] float32 log probability of each token of each option on a canvas of masks."""
    sequence = model.arrange(rows)
    logits = model.logits_at(sequence, sequence.kind == ANSWER).float()  # [B*G V]
    logits[:, model.spec.mask_id] = -torch.inf  # as in decoding: the mask is never an answer
    logp = logits.log_softmax(1).unflatten(0, (len(rows), -1))  # [B G V]
    at = options.T.expand(len(rows), -1, -1)  # [B G O]
    return logp.gather(2, at).transpose(1, 2)  # [B O G]
