"""Embed images, recordings and texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdlm.messages import RAW, Example, Media, Message, Text
from mmdlm.model import MultimodalDLM, require_model
from mmdlm.processor import MediaCache
from mmdlm.tasks.generate import as_list, check_batch_size


@torch.no_grad()
def embed(
    model: MultimodalDLM,
    *,
    image: Any = None,
    audio: Any = None,
    text: str | list[str] | None = None,
    batch_size: int = 16,
) -> Tensor:
    """Unit-length embedding of an image, a recording, a text, or a combination of them.

    Mean of the backbone's final hidden states over all real tokens of the item, L2-normalized.
    The tokens are media, then text; there is no canvas. The models are not trained for retrieval:
    compare embeddings of the same model and the same kind of input only.

    Args:
        model: model.
        image: see `mmdlm.caption`; or a list.
        audio: see `mmdlm.transcribe`; or a list.
        text: text, or a list of texts. All lists need the same length; a single value is repeated.
        batch_size: items per batch. In float32 it changes embeddings by less than 1e-6, as sums are
            taken in another order; in bfloat16 by less than 1e-3.
    Returns:
        float32 [D] on the CPU, or [N D] if a list was given; dot products are cosines.
    Raises:
        ValueError: nothing was given, lists differ in length, or an item is not valid.
    """
    require_model(model, "embed")
    check_batch_size(batch_size)
    given = {"image": image, "audio": audio, "text": text}
    given = {name: value for name, value in given.items() if value is not None}
    sizes = {name: len(value) for name, value in given.items() if isinstance(value, list)}
    if not given:
        raise ValueError("embed: got no input, expected image=, audio= or text=")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"embed: lists have lengths {sizes}, expected equal lengths")
    for kind in given.keys() - {"text"}:
        model.processor.require(kind)
    count = next(iter(sizes.values()), 1)
    columns = {
        name: [*as_list(value)] * (1 if name in sizes else count) for name, value in given.items()
    }
    examples = [_example({name: c[i] for name, c in columns.items()}) for i in range(count)]
    media = MediaCache(examples)
    vectors = []
    for start in range(0, count, batch_size):
        batch = range(start, min(count, start + batch_size))
        media.numbers = batch
        packed = model.processor.pack([examples[i] for i in batch], media)
        sequence = model.embed(packed.prompts, media.embeddings)
        media.forget()
        hidden = model.hidden(sequence).float() * sequence.mask[..., None]  # [B L D]
        vectors.append(torch.nn.functional.normalize(hidden.sum(1), dim=1).cpu())
    table = torch.cat(vectors) if vectors else torch.zeros(0, model.spec.transformer.width)
    return table if sizes else table[0]


def _example(item: dict[str, Any]) -> Example:
    """Media, then text, of one item, without a chat template."""
    media = [Media(kind, item[kind]) for kind in ("image", "audio") if kind in item]
    text = [Text(item["text"])] if "text" in item else []
    return Example((Message(RAW, (*media, *text)),))
