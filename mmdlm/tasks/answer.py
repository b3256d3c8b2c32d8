"""Answer questions, freely or by choosing among given texts."""

from __future__ import annotations

import time
from collections.abc import Hashable
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmdlm.decoding.plans.stop_sequences import StopSequences
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
    numbered,
    user,
)
from mmdlm.model import MultimodalDLM, require_model
from mmdlm.processor import MediaCache
from mmdlm.tasks.generate import (
    Answer,
    Filled,
    as_list,
    batches,
    fill,
    resolve_settings,
    to_answers,
    unwrap,
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
    stop: Items[str] = (),
    features: dict[Hashable, Any] | None = None,
) -> Any:
    """Answer a question, with or without an image, or continue a conversation.

    A list of questions, a list of images, or two lists of equal length give a list of answers.
    An image used by several questions is encoded once. Several images or clips in ONE question,
    or several turns, are passed as a conversation.

    Args:
        model: model.
        question: text, or a conversation of messages with text, images and clips in any order
            (see `mmdlm.messages.conversation`), or a list of either.
        image: see `mmdlm.caption`; None for a question without an image, or a conversation.
        images: list of images; the same as `image=[...]`.
        choices: candidate texts; the most probable one is returned, see `choose`. Nothing is
            decoded, so `strategies` and `seed` have no effect.
        prompt: instruction that contains {question}; None: the checkpoint's default, else the
            question alone. Not used for conversations.
        length: canvas length in tokens; None: the checkpoint's default, else 32.
        strategies: preset name or list, see `mmdlm.decode`; None: the checkpoint's default.
        batch_size: questions per batch; in float32 it does not change the answers, see `fill`.
        details: return `mmdlm.tasks.generate.Answer` instead of text.
        seed: random seed, the same for every question; None: torch's default generator.
        stop: texts that end an answer: only what stands before the first is filled, and the answer
            is cut there (`mmdlm.decoding.plans.stop_sequences.StopSequences`).
        features: a dict, empty at first, that keeps what encoders make of images and clips from
            one call to the next; the weights must not change meanwhile.
    Returns:
        str, or list[str] for a list; `Answer` instead of str if details=True.
    Raises:
        ValueError: lists differ in length, or an image, question or choice is not valid.
    """
    require_model(model, "answer")
    if images is not None:
        if image is not None:
            raise ValueError("give image= or images=, not both")
        image = list(images)
    settings = resolve_settings(model, "answer", prompt, length, strategies, needs_prompt=False)
    is_many, conversations = _conversations(model, question, image, settings.prompt or "{question}")
    if choices is not None:
        if stop:
            raise ValueError("choices= and stop= exclude each other: a choice is not decoded")
        default = (model.preset.get("answer") or {}).get("length")
        options = encode_choices(model, choices, length, default)
        slot = assistant(Slot(length=options.shape[1]))
        examples = [Example((*messages, slot)) for messages in conversations]
        answers = choose(model, examples, choices, options, batch_size, features)
    else:
        slot = assistant(Slot(length=settings.length))
        examples = [Example((*messages, slot)) for messages in conversations]
        stops = _stops(model, stop)
        strategies = [*settings.strategies, *([StopSequences(stops)] if stops else [])]
        run = {"batch_size": batch_size, "seed": seed, "features": features}
        filled = fill(model, examples, strategies, **run)
        answers = to_answers(model, [_cut(model, each, stops) for each in filled])
    return unwrap(answers, is_many, details)


def _stops(model: MultimodalDLM, texts: Items[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of stop texts."""
    if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop is {texts!r}, expected a list of texts, none of them empty")
    return tuple(tuple(model.processor.encode(text).tolist()) for text in texts)


def _cut(model: MultimodalDLM, filled: Filled, stops: Items[tuple[int, ...]]) -> Filled:
    """The canvas with end tokens from the first stop on."""
    tokens = filled.tokens
    at = [i for i in range(len(tokens)) for ids in stops if tuple(tokens[i : i + len(ids)]) == ids]
    if not at:
        return filled
    rest = len(tokens) - min(at)
    return replace(filled, tokens=[*tokens[: min(at)], *[model.spec.eos_id] * rest])


def _conversations(
    model: MultimodalDLM, question: Any, image: Any, pattern: str
) -> tuple[bool, list[tuple[Message, ...]]]:
    """(whether to return a list, messages of each question)."""
    is_one = is_conversation(question)
    if is_one or (isinstance(question, list) and any(map(is_conversation, question))):
        if image is not None:
            raise ValueError(
                "image= was given with a conversation; put the image into its messages"
            )
        return not is_one, numbered(conversation, [question] if is_one else question)
    if image is not None:
        model.processor.require("image")
    if "{question}" not in pattern:
        raise ValueError(f"prompt is {pattern!r}, expected a text that contains {{question}}")
    messages = []
    for text, item in pair_questions(question, image):
        media = () if item is None else (Media("image", item),)
        messages.append((user(*media, pattern.replace("{question}", text)),))
    return isinstance(question, list) or isinstance(image, list), messages


def pair_questions(question: str | list[str], image: Any) -> list[tuple[str, Any]]:
    """(question, image) pairs; a single value is repeated for the other's list."""
    questions, images = as_list(question), as_list(image)
    for text in questions:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"question is {text!r}, expected text or a conversation")
    if isinstance(question, list) and isinstance(image, list) and len(questions) != len(images):
        raise ValueError(
            f"got {len(questions)} questions and {len(images)} images, expected lists of equal "
            "length, or one question or one image"
        )
    count = max(len(questions), len(images)) if questions and images else 0
    return [(questions[i % len(questions)], images[i % len(images)]) for i in range(count)]


def encode_choices(
    model: MultimodalDLM, choices: Items[str], length: int | None, default: int | None
) -> Tensor:
    """Token ids [O G] int64 of the choices, padded with end tokens to the same length.

    Args:
        model: model with a tokenizer.
        choices: at least two distinct texts.
        length: canvas length G in tokens; None: `default`, else the longest choice plus one.
        default: the checkpoint's canvas length.
    Raises:
        ValueError: a choice is empty, given twice, or longer than `length`.
    """
    if isinstance(choices, str) or len(choices) < 2 or len(set(choices)) < len(choices):
        raise ValueError(f"choices is {choices!r}, expected two or more distinct texts")
    ids = [model.processor.encode(choice) for choice in choices]
    longest = max(len(one) for one in ids)
    if min(len(one) for one in ids) == 0:
        raise ValueError(f"choices is {choices!r}, expected no empty text")
    size = max(default or longest + 1, longest) if length is None else length
    if size < longest:
        raise ValueError(
            f"length is {size}, but a choice has {longest} tokens; pass a larger length"
        )
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
    features: dict[Hashable, Any] | None = None,
) -> list[Answer]:
    """Most probable choice of each example, from one forward per batch.

    The input canvas holds masks only. The score of a choice is the sum of the log probabilities
    of its tokens, end tokens included. A softmax over the choices gives their probabilities.

    Args:
        model: model.
        examples: examples with a slot of G tokens.
        choices: O texts.
        options: [O G] int64, see `encode_choices`.
        batch_size: examples per batch.
        features: see `answer`.
    """
    media = MediaCache(examples, embeddings={} if features is None else features)
    table, answers = options.to(model.device), []
    for batch in batches([0] * len(examples), batch_size):
        media.numbers = batch
        packed = model.processor.pack([examples[i] for i in batch], media)
        begin = time.perf_counter()
        sequence = model.embed(packed.rows, media.embeddings)
        if features is None:
            media.forget()
        scored = _log_probabilities(model, sequence, table)  # [B O G]
        probabilities = scored.sum(2).softmax(1)  # [B O]
        seconds = time.perf_counter() - begin
        for row, per_token in zip(probabilities.tolist(), scored.exp().tolist(), strict=True):
            answers.append(_choice_answer(model, choices, row, per_token, seconds))
    return answers


def _choice_answer(
    model: MultimodalDLM,
    choices: Items[str],
    probabilities: list[float],
    per_token: list[list[float]],
    seconds: float,
) -> Answer:
    """Answer of one example.

    Args:
        model: model.
        choices: O texts.
        probabilities: O probabilities of the choices.
        per_token: O lists of token probabilities.
        seconds: see `Answer`.
    """
    best = max(range(len(choices)), key=probabilities.__getitem__)
    tokens = model.processor.encode(choices[best]).tolist()
    step, confidence = (0,) * len(tokens), tuple(per_token[best][: len(tokens)])
    return Answer(
        choices[best],
        tuple(tokens),
        1,
        seconds,
        confidence,
        step,
        words(model, tokens, step, confidence),
        probabilities=dict(zip(choices, probabilities, strict=True)),
    )


def _log_probabilities(model: MultimodalDLM, sequence: Sequence, options: Tensor) -> Tensor:
    """[B O G] float32 log probability of each token of each option, given a masked canvas."""
    batch = len(sequence.tokens)
    logits = model.logits_at(sequence, sequence.is_answer).float()  # [B*G V]
    logits[:, model.spec.mask_id] = -torch.inf  # as in decoding: the mask id is never predicted
    logp = logits.log_softmax(1).unflatten(0, (batch, -1))  # [B G V]
    at = options.T.expand(batch, -1, -1)  # [B G O]
    return logp.gather(2, at).transpose(1, 2)  # [B O G]
