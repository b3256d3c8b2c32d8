"""Fill in the [MASK] slots of a text, or the values of a JSON schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from encoders.checks import shown
from mmdlm.decoding.guidance.suppress import Suppress
from mmdlm.decoding.preset import Choice
from mmdlm.decoding.strategy import Strategy
from mmdlm.messages import RAW, Example, Media, Message, Slot, Text, assistant, numbered
from mmdlm.model import MultimodalDLM, require_model
from mmdlm.processor import NOTHING
from mmdlm.tasks.generate import (
    Answer,
    Filled,
    end_ids,
    fill,
    masked_canvas,
    resolve_settings,
    unwrap,
)
from mmdlm.tasks.scaffold import Form, complete
from mmdlm.tasks.schema import STRING

SLOT = re.compile(r"\[MASK(?::(\d{1,12}))?\]")


@dataclass(frozen=True)
class ClozeText:
    """A text with slots, split into text, slot, text, ..., slot, text.

    Args:
        texts: known texts around the slots, verbatim; one more than there are slots.
        sizes: number of tokens of each slot.
    """

    texts: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Canvas positions of a template.

    Args:
        slots: positions of each slot.
        size: number of tokens without the end tokens that pad the canvas.
    """

    slots: tuple[slice, ...]
    size: int


def infill(
    model: MultimodalDLM,
    template: str | Mapping[str, Any] | list[str] | list[Mapping[str, Any]],
    image: Any = None,
    *,
    images: list[Any] | None = None,
    prompt: str | list[str] | None = None,
    length: int | None = None,
    strategies: Choice = None,
    batch_size: int = 16,
    details: bool = False,
    seed: int | None = None,
    slot: int = STRING,
    fence: bool = True,
) -> Any:
    """Fill in the slots of a text, or generate JSON that conforms to a schema.

    In a text, `[MASK]` is one token and `[MASK:3]` are three; all other text is kept verbatim. The
    model attends to the text on both sides of a slot. End tokens are never predicted in a slot.
    For a JSON schema (a dict, see `mmdlm.tasks.schema.parse`) the result is always valid JSON with
    the types, choices and limits of the schema. A warning lists values that were changed for that.

    Security: the template is part of the assistant's turn, which is checked less strictly than
    user text. Do not build it from untrusted text; pass that as `prompt`.

    Args:
        model: model.
        template: text with slots, or a JSON schema; or a list of either.
        image: context of the text, see `mmdlm.caption`. Lists of templates, images and prompts
            need equal lengths; a single value is repeated.
        images: several images of one template, in the order of training; or a list of such lists.
        prompt: instruction before the text; None: the checkpoint's default. Without prompt and
            image, the text before the first slot is the prompt, and may be empty. For a schema, see
            `mmdlm.tasks.scaffold.instruction`.
        length: canvas length in tokens, padded with end tokens as in training; None: the
            checkpoint's default, else the length of the text.
        strategies: preset name or list, see `mmdlm.decode`; None: the checkpoint's default.
        batch_size: texts per batch; in float32 it does not change the results, see `fill`.
        details: return `mmdlm.tasks.generate.Answer`; known tokens have step -1, confidence 0.
        seed: random seed, the same for every text; None: torch's default generator.
        slot: default number of tokens of a string of the schema.
        fence: write the JSON in a Markdown code fence on the canvas; the result is without it.
    Returns:
        str, or list[str] for a list; `Answer` instead of str if details=True.
    Raises:
        ValueError: a text has no slot or is longer than `length`, or the schema uses an
            unsupported keyword.
    """
    require_model(model, "infill")
    image = _several(image, images)
    if image is not None:
        model.processor.require("image")
    rows = _rows(template, image, prompt)
    is_schema = _are_schemas(rows)
    single = None if isinstance(prompt, list) else prompt
    given = {"needs_prompt": False, "is_sized": length is not None}
    settings = resolve_settings(model, "infill", single, length, strategies, **given)
    default = (model.preset.get("infill") or {}).get("length")
    requests = [
        (
            template,
            settings.prompt if instruction is None else instruction,
            () if image is None else _media(item),
        )
        for template, item, instruction in rows
    ]
    run = {"strategies": settings.strategies, "batch_size": batch_size, "seed": seed}
    run |= {"length": length, "default": default}
    if is_schema:
        forms = [Form(*request) for request in requests]
        answers = complete(model, forms, slot=slot, fence=fence, **run)
    else:
        answers = _fill_texts(model, requests, **run)
    return unwrap(answers, any(isinstance(x, list) for x in (template, image, prompt)), details)


def _several(image: Any, images: list[Any] | None) -> Any:
    """Value of `image`, in which several images of one template are a tuple."""
    if images is None:
        return image
    if image is not None:
        raise ValueError("give image= or images=, not both")
    if not images:
        raise ValueError("images is empty, expected at least one image")
    if all(isinstance(each, list | tuple) for each in images):
        return [tuple(each) for each in images]
    return tuple(images)


def _media(item: Any) -> tuple[Media, ...]:
    """An image, or a tuple of several, as media."""
    items = item if isinstance(item, tuple) else (item,)
    return tuple(Media("image", one) for one in items)


def _are_schemas(rows: list[tuple]) -> bool:
    """True if all templates are schemas, False if all are texts.

    Raises:
        TypeError: there are both.
    """
    kinds = {isinstance(template, Mapping) for template, *_ in rows}
    if len(kinds) > 1:
        raise TypeError("template is a list of texts and schemas, expected only one kind per call")
    return kinds == {True}


def _fill_texts(
    model: MultimodalDLM,
    requests: list[tuple[str, str | None, tuple[Media, ...]]],
    strategies: list[Strategy],
    length: int | None,
    default: int | None,
    batch_size: int,
    seed: int | None,
) -> list[Answer]:
    """Answers of requests (template, prompt, media)."""

    def build(request: tuple[str, str | None, tuple[Media, ...]]) -> tuple[Example, Span]:
        template, prompt, media = request
        return _example(model, parse(template), prompt, media, length, default)

    built = numbered(build, requests)
    strategies = [*strategies, Suppress(ids=sorted(end_ids(model)))]
    examples = [example for example, _ in built]
    filled = fill(model, examples, strategies, batch_size=batch_size, seed=seed)
    return [
        _finish(model, parse(template), span, canvas)
        for (template, _, _), (_, span), canvas in zip(requests, built, filled, strict=True)
    ]


def _rows(template: Any, image: Any, prompt: Any) -> list[tuple[Any, Any, Any]]:
    """(template, image, prompt) of each text; single values are repeated."""
    given = {"templates": template, "images": image, "prompts": prompt}
    sizes = {name: len(value) for name, value in given.items() if isinstance(value, list)}
    if len(set(sizes.values())) > 1:
        counts = " and ".join(f"{size} {name}" for name, size in sizes.items())
        raise ValueError(f"got {counts}, expected lists of equal length, or one value")
    count = next(iter(sizes.values()), 1)
    columns = [x if isinstance(x, list) else [x] * count for x in given.values()]
    return list(zip(*columns, strict=True))


def parse(text: str) -> ClozeText:
    """Split a template at its slots.

    Raises:
        TypeError: the template is not a string.
        ValueError: it has no slot, or a slot of 0 tokens.
    """
    if not isinstance(text, str):
        raise TypeError(f"template is a {type(text).__name__}, expected text")
    pieces = SLOT.split(text)
    sizes = tuple(1 if size is None else int(size) for size in pieces[1::2])
    if not sizes or min(sizes) < 1:
        has = "a slot of 0 tokens" if sizes else "no slot"
        raise ValueError(
            f"template {shown(text)} has {has}; write [MASK] for one missing token, [MASK:3] for "
            "three"
        )
    return ClozeText(tuple(pieces[::2]), sizes)


def _example(
    model: MultimodalDLM,
    cloze: ClozeText,
    prompt: str | None,
    media: tuple[Media, ...],
    length: int | None,
    default: int | None,
) -> tuple[Example, Span]:
    """Example of a template, and its positions on the canvas."""
    # Tokenizers attach the space before a word to the word, so it is part of the slot; further
    # spaces are indentation.
    texts = [model.processor.encode(text.removesuffix(" ")) for text in cloze.texts]
    instruction = () if prompt is None else (Text(prompt),)
    role = "user"
    if prompt is None and not media:
        role, instruction, texts[0] = RAW, (Text(texts[0]),), NOTHING
    parts, slots, end = [texts[0]], [], len(texts[0])
    for size, text in zip(cloze.sizes, texts[1:], strict=True):
        parts += [masked_canvas(model, size), text]
        slots.append(slice(end, end + size))
        end += size + len(text)
    if length is not None and end > length:
        raise ValueError(
            f"length is {length}, but the template has {end} tokens; pass a larger one"
        )
    parts.append(torch.full((max(0, (length or default or 0) - end),), model.spec.eos_id))
    question = Message(role, (*media, *instruction))
    return Example((question, assistant(Slot(value=torch.cat(parts))))), Span(tuple(slots), end)


def _finish(model: MultimodalDLM, cloze: ClozeText, span: Span, filled: Filled) -> Answer:
    """Answer whose text is the template with its slots filled in."""
    text, tokenizer = cloze.texts[0], model.tokenizer
    for slot, following in zip(span.slots, cloze.texts[1:], strict=True):
        tokens = filled.tokens[slot]
        new = tokenizer.continuation(tokens) if text else tokenizer.decode(tokens)
        # The space before a slot is in the template and belongs to the first token of the slot.
        text += (new.removeprefix(" ") if text.endswith(" ") else new) + following
    return filled.answer(model, text, span.size)
