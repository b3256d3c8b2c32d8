"""Embed images, recordings and texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdlm.messages import (
    RAW,
    Example,
    Media,
    Message,
    Slot,
    Text,
    assistant,
    conversation,
    is_conversation,
    numbered,
)
from mmdlm.model import MultimodalDLM, require_model
from mmdlm.processor import MediaCache
from mmdlm.representation import Pooling, vectors
from mmdlm.tasks.generate import as_list, check_batch_size


@torch.no_grad()
def embed(
    model: MultimodalDLM,
    messages: Any = None,
    *,
    image: Any = None,
    audio: Any = None,
    text: str | list[str] | None = None,
    pooling: Pooling = "mean",
    masks: int | None = None,
    batch_size: int = 16,
) -> Tensor:
    """Unit-length embedding of an image, a recording, a text, or a conversation with all of them.

    The backbone's final hidden states, pooled over media and text and L2-normalized; there is no
    canvas. Models that were not trained for it (`mmdlm.objectives.contrastive`) are useful for
    inputs of the same kind only.

    Args:
        model: model.
        messages: a conversation with text, images and clips in any order, see
            `mmdlm.messages.conversation`; or a list of them. Not with the arguments below.
        image: see `mmdlm.caption`; or a list.
        audio: see `mmdlm.transcribe`; or a list.
        text: text, or a list of texts. All lists need the same length; a single value is repeated.
        pooling: "mean" over all tokens; "text": over the text alone (all tokens without text);
            "last": the last token.
        masks: K; append K mask tokens, and give the hidden state of each (representative tokens,
            DiffRetriever). Compare them with `mmdlm.representation.similarity`.
        batch_size: items per batch. In float32 it changes embeddings by less than 1e-6, as sums are
            taken in another order; in bfloat16 by less than 1e-3.
    Returns:
        float32 [D] on the CPU, or [N D] if a list was given; dot products are cosines. With
        `masks`, [K D] or [N K D].
    Raises:
        ValueError: nothing was given, lists differ in length, or an item is not valid.
    """
    require_model(model, "embed")
    check_batch_size(batch_size)
    if pooling not in ("mean", "text", "last") or (masks is not None and pooling != "mean"):
        raise ValueError(
            f"embed: pooling is {pooling!r}, expected mean, text or last, and none beside masks"
        )
    given = {"image": image, "audio": audio, "text": text}
    examples, is_many = _examples(model, messages, given)
    slot = () if masks is None else (assistant(Slot(length=masks)),)
    examples = [Example((*one.messages, *slot)) for one in examples]
    how = pooling if masks is None else "masks"
    media, found = MediaCache(examples), []
    for start in range(0, len(examples), batch_size):
        batch = range(start, min(len(examples), start + batch_size))
        media.numbers = batch
        packed = model.processor.pack([examples[i] for i in batch], media)
        sequence = model.embed(packed.rows, media.embeddings)
        media.forget()
        found.append(vectors(model, sequence, how).cpu())
    table = torch.cat(found) if found else torch.zeros(0, masks or 1, model.spec.transformer.width)
    table = table if masks is not None else table[:, 0]
    return table if is_many else table[0]


def _examples(
    model: MultimodalDLM, messages: Any, given: dict[str, Any]
) -> tuple[list[Example], bool]:
    """What is to be embedded, and whether it was a list."""
    given = {name: value for name, value in given.items() if value is not None}
    if messages is not None:
        if given:
            raise ValueError(f"embed: got a conversation and {', '.join(given)}; expected either")
        is_one = is_conversation(messages)
        talks = numbered(conversation, [messages] if is_one else list(messages))
        return [Example(talk) for talk in talks], not is_one
    sizes = {name: len(value) for name, value in given.items() if isinstance(value, list)}
    if not given:
        raise ValueError("embed: got no input, expected messages, image=, audio= or text=")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"embed: lists have lengths {sizes}, expected equal lengths")
    for kind in given.keys() - {"text"}:
        model.processor.require(kind)
    count = next(iter(sizes.values()), 1)
    columns = {
        name: [*as_list(value)] * (1 if name in sizes else count) for name, value in given.items()
    }
    items = [{name: column[i] for name, column in columns.items()} for i in range(count)]
    return list(map(_example, items)), bool(sizes)


def _example(item: dict[str, Any]) -> Example:
    """Media, then text, of one item, without a chat template."""
    media = [Media(kind, item[kind]) for kind in ("image", "audio") if kind in item]
    text = [Text(item["text"])] if "text" in item else []
    return Example((Message(RAW, (*media, *text)),))
