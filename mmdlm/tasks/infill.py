"""Missing words of a text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdlm.decoding.preset import Choice
from mmdlm.decoding.suppress import Suppress
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import (
    Answer,
    Filled,
    blank,
    end_ids,
    fill,
    listed,
    settings,
    shown,
    text_ids,
    words,
)
from mmdlm.tasks.request import Request, check_kind

NOTHING = torch.zeros(0, dtype=torch.long)
SLOT = re.compile(r"\[MASK(?::(\d+))?\]")


@dataclass(frozen=True)
class Template:
    """A text with slots, cut up: text, slot, text, ..., slot, text.

    Args:
        texts: the known texts around the slots, verbatim; one more than slots.
        sizes: tokens of each slot.
    """

    texts: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where a template lies in its canvas: its slots, and the size of it all without completion."""

    slots: tuple[slice, ...]
    size: int


def infill(
    model: MultimodalDLM,
    template: str | list[str],
    image: Any = None,
    *,
    prompt: str | None = None,
    length: int | None = None,
    strategies: Choice = None,
    batch_size: int = 16,
    details: bool = False,
    seed: int | None = None,
) -> Any:
    """The text with its slots filled in; of a list of texts, the list of them.

    `[MASK]` stands for one token and `[MASK:3]` for three; everything else is known and comes back
    as it was written. Words on both sides of a slot count, and a slot never ends the text.

    Args:
        model: the model.
        template: text with slots, or a list.
        image: what the text is about, see `mmdlm.caption`; a list goes with the templates, one by
            one, and one image or one template with all of the other.
        prompt: instruction before the text; None for the checkpoint's own. Without either and
            without an image, the text before the first slot is the prompt.
        length: tokens to which the text is completed with end tokens, as in training; None for the
            checkpoint's own, else the text itself.
        strategies: a preset's name or a list, see `mmdlm.decode`; None for the checkpoint's own.
        batch_size: texts decoded together; it does not change what is filled in.
        details: return `mmdlm.tasks.generate.Answer`; known tokens have step -1, confidence 0.
        seed: of strategies that draw random numbers.
    Raises:
        ValueError: a text has no slot, is longer than `length`, or begins with a slot and has
            nothing before it.
    """
    if image is not None:
        check_kind(model, "image")
    given, seen = listed(template), listed(image)
    if isinstance(template, list) and isinstance(image, list) and len(given) != len(seen):
        raise ValueError(f"{len(given)} templates and {len(seen)} images; give as many, or one")
    how = settings(model, "infill", prompt, length, strategies, needs_prompt=False)
    own = (model.preset.get("infill") or {}).get("length")
    count = max(len(given), len(seen)) if given and seen else 0
    parsed = [parse(given[i % len(given)]) for i in range(count)]
    asked = []
    for i, cut in enumerate(parsed):
        media = () if image is None else (("image", seen[i % len(seen)]),)
        asked.append(_request(model, cut, how.prompt, media, length, own))
    requests = [request for request, _ in asked]
    strategies = [*how.strategies, Suppress(ids=sorted(end_ids(model)))]
    filled = fill(model, requests, strategies, batch_size=batch_size, seed=seed)
    answers = [
        _finish(model, cut, layout, each)
        for cut, (_, layout), each in zip(parsed, asked, filled, strict=True)
    ]
    return shown(answers, isinstance(template, list) or isinstance(image, list), details)


def parse(text: str) -> Template:
    """A template cut up at its slots.

    Raises:
        ValueError: it has none, or one of no tokens.
    """
    if not isinstance(text, str):
        raise TypeError(f"template is a {type(text).__name__}, expected text")
    cut = SLOT.split(text)
    sizes = tuple(1 if size is None else int(size) for size in cut[1::2])
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"template {text!r} has {'a slot of no tokens' if sizes else 'no slot'}; write [MASK] "
            "for one missing token, [MASK:3] for three"
        )
    return Template(tuple(cut[::2]), sizes)


def _request(
    model: MultimodalDLM,
    cut: Template,
    prompt: str | None,
    media: tuple[tuple[str, Any], ...],
    length: int | None,
    own: int | None,
) -> tuple[Request, Layout]:
    """The request of a template, and how it lies in the canvas."""
    # The word before a slot ends at its last letter: the space belongs to what fills the slot.
    texts = [text_ids(model, text.rstrip(" ")) for text in cut.texts]
    head: str | Tensor = NOTHING if prompt is None else prompt
    if prompt is None and not media:
        if not len(texts[0]):
            raise ValueError(
                "the template begins with a slot and nothing stands before it; pass prompt='...'"
            )
        head, texts[0] = texts[0], NOTHING
    parts, slots, at = [texts[0]], [], len(texts[0])
    for size, text in zip(cut.sizes, texts[1:], strict=True):
        parts += [blank(model, size), text]
        slots.append(slice(at, at + size))
        at += size + len(text)
    if length is not None and at > length:
        raise ValueError(f"the template has {at} tokens, the canvas {length}; pass a larger length")
    rest = max(0, (length or own or 0) - at)
    parts.append(torch.full((rest,), model.spec.eos_id))
    return Request(head, torch.cat(parts), media), Layout(tuple(slots), at)


def _finish(model: MultimodalDLM, cut: Template, layout: Layout, filled: Filled) -> Answer:
    """The template with its slots filled in."""
    text = cut.texts[0]
    for slot, following in zip(layout.slots, cut.texts[1:], strict=True):
        new = model.tokenizer.decode(filled.tokens[slot])
        if not text or text[-1].isspace():
            new = new.lstrip()
        if following[:1].isspace():
            new = new.rstrip()
        text += new + following
    size = layout.size
    return Answer(
        text,
        tuple(filled.tokens[:size]),
        filled.forwards,
        filled.seconds,
        tuple(filled.confidence[:size]),
        tuple(filled.step[:size]),
        words(model, filled.tokens[:size], filled.step, filled.confidence),
    )
