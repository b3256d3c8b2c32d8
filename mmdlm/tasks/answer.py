"""Answers to questions, in the model's own words or from fixed choices."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor

from mmdlm.decoding.preset import Choice
from mmdlm.layout import Sequence
from mmdlm.messages import (
    Example,
    Media,
    Message,
    Slot,
    assistant,
    conversation,
    is_conversation,
    user,
)
from mmdlm.model import MultimodalDLM
from mmdlm.processor import MediaCache
from mmdlm.tasks.generate import (
    Answer,
    batches,
    generate,
    listed,
    settings,
    shown,
    words,
)


def answer(
    model: MultimodalDLM,
    question: Any,
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
    """The answer to a question, with or without an image, or in a conversation.

    Several questions about one image, one question about several images one by one, or two lists
    of equal length give a list. An image that several questions are about is encoded once. Several
    images or clips in ONE question, or several turns, are a conversation.

    Args:
        model: the model.
        question: a text; a conversation, see `mmdlm.messages.conversation`, whose messages hold
            text, images and clips in any order; or a list of either.
        image: see `mmdlm.caption`; None for a question without an image, or a conversation.
        images: a list of images; the same as `image=[...]`.
        choices: texts of which the most probable is the answer, see `choose`; nothing is decoded,
            so `strategies` and `seed` have no effect.
        prompt: instruction around the question, with {question} in it; None for the checkpoint's
            own, or the bare question. Conversations are taken as they are.
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
    how = settings(model, "answer", prompt, length, strategies, needs_prompt=False)
    is_many, asked = _conversations(model, question, image, how.prompt or "{question}")
    if choices is not None:
        own = (model.preset.get("answer") or {}).get("length")
        options = completed(model, choices, length, own)
        examples = [Example((*one, assistant(Slot(length=options.shape[1])))) for one in asked]
        answers = choose(model, examples, choices, options, batch_size)
    else:
        examples = [Example((*one, assistant(Slot(length=how.length)))) for one in asked]
        answers = generate(model, examples, how.strategies, batch_size=batch_size, seed=seed)
    return shown(answers, is_many, details)


def _conversations(
    model: MultimodalDLM, question: Any, image: Any, pattern: str
) -> tuple[bool, list[tuple[Message, ...]]]:
    """Whether a list was asked for, and the messages of each question."""
    is_one = is_conversation(question)
    if is_one or (isinstance(question, list) and any(map(is_conversation, question))):
        if image is not None:
            raise ValueError("a conversation holds its images; leave image= out")
        return not is_one, [conversation(q) for q in ([question] if is_one else question)]
    if image is not None:
        model.processor.require("image")
    if "{question}" not in pattern:
        raise ValueError(
            f"prompt {pattern!r} has no place for the question; write {{question}} where it goes"
        )
    asked = [
        (user(*(() if it is None else (Media("image", it),)), pattern.replace("{question}", one)),)
        for one, it in pairs(question, image)
    ]
    return isinstance(question, list) or isinstance(image, list), asked


def pairs(question: str | list[str], image: Any) -> list[tuple[str, Any]]:
    """Questions with the image of each."""
    asked, seen = listed(question), listed(image)
    for one in asked:
        if not isinstance(one, str) or not one.strip():
            raise ValueError(f"question is {one!r}, expected text or a conversation")
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
    ids = [model.processor.encode(choice) for choice in choices]
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
    examples: Items[Example],
    choices: Items[str],
    options: Tensor,
    batch_size: int,
) -> list[Answer]:
    """The most probable choice of each example, from one forward per batch.

    The forward sees a canvas of masks. A choice scores the sum of the log probabilities of its
    tokens, completed with end tokens; a softmax over the choices gives their probabilities.

    Args:
        model: the model.
        examples: with a slot as long as the options.
        choices: O texts.
        options: [O G] int64, see `completed`.
        batch_size: examples per batch.
    """
    media = MediaCache(examples)
    table, answers = options.to(model.device), []
    for batch in batches([0] * len(examples), batch_size):
        media.numbers = batch
        packed = model.processor.pack([examples[i] for i in batch], media)
        begin = time.perf_counter()
        sequence = model.embed(packed.rows, media.embeddings)
        media.forget()
        scored = _log_probabilities(model, sequence, table)  # [B O G]
        chance = scored.sum(2).softmax(1)  # [B O]
        seconds = time.perf_counter() - begin
        for row, sure in zip(chance.tolist(), scored.exp().tolist(), strict=True):
            answers.append(_chosen(model, choices, row, sure, seconds))
    return answers


def _chosen(
    model: MultimodalDLM,
    choices: Items[str],
    chance: list[float],
    sure: list[list[float]],
    seconds: float,
) -> Answer:
    """The answer of one example.

    Args:
        model: the model.
        choices: O texts.
        chance: probability of each.
        sure: probability of each token of each.
        seconds: see `Answer`.
    """
    best = max(range(len(choices)), key=chance.__getitem__)
    tokens = model.processor.encode(choices[best]).tolist()
    step, own = (0,) * len(tokens), tuple(sure[best][: len(tokens)])
    return Answer(
        choices[best],
        tuple(tokens),
        1,
        seconds,
        own,
        step,
        words(model, tokens, step, own),
        probabilities=dict(zip(choices, chance, strict=True)),
    )


def _log_probabilities(model: MultimodalDLM, sequence: Sequence, options: Tensor) -> Tensor:
    """[B O G] float32 log probability of each token of each option on a canvas of masks."""
    batch = len(sequence.tokens)
    logits = model.logits_at(sequence, sequence.is_answer).float()  # [B*G V]
    logits[:, model.spec.mask_id] = -torch.inf  # as in decoding: the mask is never an answer
    logp = logits.log_softmax(1).unflatten(0, (batch, -1))  # [B G V]
    at = options.T.expand(batch, -1, -1)  # [B G O]
    return logp.gather(2, at).transpose(1, 2)  # [B O G]
