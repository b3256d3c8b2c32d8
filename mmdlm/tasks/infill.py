"""Missing words of a text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmdlm.decoding.guidance.suppress import Suppress
from mmdlm.decoding.preset import Choice
from mmdlm.decoding.strategy import Strategy
from mmdlm.messages import RAW, Example, Media, Message, Slot, Text, assistant
from mmdlm.model import MultimodalDLM
from mmdlm.processor import NOTHING
from mmdlm.tasks.generate import Answer, Filled, blank, end_ids, fill, settings, shown, words
from mmdlm.tasks.scaffold import Form, complete
from mmdlm.tasks.schema import STRING

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
    template: str | Mapping[str, Any] | list[str] | list[Mapping[str, Any]],
    image: Any = None,
    *,
    prompt: str | list[str] | None = None,
    length: int | None = None,
    strategies: Choice = None,
    batch_size: int = 16,
    details: bool = False,
    seed: int | None = None,
    slot: int = STRING,
    fence: bool = True,
) -> Any:
    """The text with its slots filled in, or a JSON text of a schema; of a list, the list of them.

    In a text, `[MASK]` stands for one token and `[MASK:3]` for three; everything else is known and
    comes back as it was written. Words on both sides of a slot count, and a slot never ends the
    text. A JSON schema (a dict, see `mmdlm.tasks.schema.parse`) gets a JSON text that parses and
    has the types, choices, limits and sizes of the schema, whatever the model writes; a value that
    had to be changed for that is named in a warning.

    Only what is given here as `template` is filled in. It is the author's part: the model completes
    it as its own words, and refuses less than it would in an answer. So build it yourself, and put
    what others wrote into `prompt`, where a mask token is refused.

    Args:
        model: the model.
        template: text with slots, or a JSON schema; or a list of either.
        image: what the text is about, see `mmdlm.caption`. Lists of templates, images and prompts
            have one length and go together one by one; what is no list goes with all.
        prompt: instruction before the text; None for the checkpoint's own. Without either and
            without an image, the text before the first slot is the prompt. For a schema,
            `mmdlm.tasks.scaffold.instruction` writes one that asks for unknown values too.
        length: tokens to which the text is completed with end tokens, as in training; None for the
            checkpoint's own, else the text itself.
        strategies: a preset's name or a list, see `mmdlm.decode`; None for the checkpoint's own.
        batch_size: texts decoded together; it does not change what is filled in.
        details: return `mmdlm.tasks.generate.Answer`; known tokens have step -1, confidence 0.
        seed: of strategies that draw random numbers.
        slot: tokens of a string, where the schema does not say.
        fence: put the JSON into a Markdown code fence on the canvas; it is not in the result.
    Raises:
        ValueError: a text has no slot, is longer than `length`, or begins with a slot and has
            nothing before it; or a schema asks for what cannot be promised.
    """
    if image is not None:
        model.processor.require("image")
    rows = _rows(template, image, prompt)
    is_form = _is_form(rows)
    one = None if isinstance(prompt, list) else prompt
    how = settings(model, "infill", one, length, strategies, needs_prompt=False)
    own = (model.preset.get("infill") or {}).get("length")
    heads = [how.prompt if head is None else head for _, _, head in rows]
    media = [() if image is None else (Media("image", seen),) for _, seen, _ in rows]
    asked = [(given, *rest) for (given, _, _), *rest in zip(rows, heads, media, strict=True)]
    run = {"strategies": how.strategies, "batch_size": batch_size, "seed": seed}
    run |= {"length": length, "own": own}
    if is_form:
        forms = [Form(*one) for one in asked]
        answers = complete(model, forms, slot=slot, fence=fence, **run)
    else:
        answers = _texts(model, asked, **run)
    return shown(answers, any(isinstance(x, list) for x in (template, image, prompt)), details)


def _is_form(rows: list[tuple]) -> bool:
    """Whether the templates are schemas.

    Raises:
        TypeError: some are.
    """
    found = {isinstance(template, Mapping) for template, *_ in rows}
    if len(found) > 1:
        raise TypeError("templates are texts and schemas; fill them in by one call each")
    return found == {True}


def _texts(
    model: MultimodalDLM,
    asked: list[tuple[str, str | None, tuple[Media, ...]]],
    strategies: list[Strategy],
    length: int | None,
    own: int | None,
    batch_size: int,
    seed: int | None,
) -> list[Answer]:
    """The texts (template, prompt, media) with their slots filled in."""
    parsed = [parse(template) for template, _, _ in asked]
    laid = [
        _example(model, cut, prompt, media, length, own)
        for cut, (_, prompt, media) in zip(parsed, asked, strict=True)
    ]
    strategies = [*strategies, Suppress(ids=sorted(end_ids(model)))]
    examples = [example for example, _ in laid]
    filled = fill(model, examples, strategies, batch_size=batch_size, seed=seed)
    return [
        _finish(model, cut, layout, each)
        for cut, (_, layout), each in zip(parsed, laid, filled, strict=True)
    ]


def _rows(template: Any, image: Any, prompt: Any) -> list[tuple[Any, Any, Any]]:
    """(template, image, prompt) of each text; what is no list goes with all of the others."""
    given = {"templates": template, "images": image, "prompts": prompt}
    sizes = {name: len(value) for name, value in given.items() if isinstance(value, list)}
    if len(set(sizes.values())) > 1:
        found = " and ".join(f"{size} {name}" for name, size in sizes.items())
        raise ValueError(f"{found}; give as many, or one")
    count = next(iter(sizes.values()), 1)
    columns = [x if isinstance(x, list) else [x] * count for x in given.values()]
    return list(zip(*columns, strict=True))


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


def _example(
    model: MultimodalDLM,
    cut: Template,
    prompt: str | None,
    media: tuple[Media, ...],
    length: int | None,
    own: int | None,
) -> tuple[Example, Layout]:
    """The example of a template, and how it lies in the canvas."""
    # The word before a slot ends at its last letter: the space belongs to what fills the slot.
    texts = [model.processor.encode(text.rstrip(" ")) for text in cut.texts]
    head = () if prompt is None else (Text(prompt),)
    role = "user"
    if prompt is None and not media:
        if not len(texts[0]):
            raise ValueError(
                "the template begins with a slot and nothing stands before it; pass prompt='...'"
            )
        role, head, texts[0] = RAW, (Text(texts[0]),), NOTHING
    parts, slots, at = [texts[0]], [], len(texts[0])
    for size, text in zip(cut.sizes, texts[1:], strict=True):
        parts += [blank(model, size), text]
        slots.append(slice(at, at + size))
        at += size + len(text)
    if length is not None and at > length:
        raise ValueError(f"the template has {at} tokens, the canvas {length}; pass a larger length")
    rest = max(0, (length or own or 0) - at)
    parts.append(torch.full((rest,), model.spec.eos_id))
    example = Example((Message(role, (*media, *head)), assistant(Slot(value=torch.cat(parts)))))
    return example, Layout(tuple(slots), at)


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
