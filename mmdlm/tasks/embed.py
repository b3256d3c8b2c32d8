"""Vectors of images, sounds and texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdlm.messages import RAW, Example, Media, Message, Text
from mmdlm.model import MultimodalDLM
from mmdlm.processor import MediaCache
from mmdlm.tasks.generate import check_batch_size, listed


@torch.no_grad()
def embed(
    model: MultimodalDLM,
    *,
    image: Any = None,
    audio: Any = None,
    text: str | list[str] | None = None,
    batch_size: int = 16,
) -> Tensor:
    """A vector of unit length for an image, a sound, a text, or several of them together.

    It is the mean of the backbone's final hidden states over all real tokens of the item (media,
    then text; no canvas, no padding), divided by its length. Models here are not trained for
    retrieval, so compare vectors of one model and one kind of input only.

    Args:
        model: the model.
        image: see `mmdlm.caption`; or a list.
        audio: see `mmdlm.transcribe`; or a list.
        text: words; or a list. Lists have one length; a single value goes with all their items.
        batch_size: items computed together; it does not change the vectors.
    Returns:
        float32 [D] on the CPU, or [N D] where a list was given; dot products are cosines.
    Raises:
        ValueError: nothing was given, lists differ in length, or an item is not valid.
    """
    check_batch_size(batch_size)
    given = {"image": image, "audio": audio, "text": text}
    given = {name: value for name, value in given.items() if value is not None}
    sizes = {name: len(value) for name, value in given.items() if isinstance(value, list)}
    if not given:
        raise ValueError("embed: nothing to embed; give image=, audio= or text=")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"embed: lists of lengths {sizes}; expected the same")
    for kind in given.keys() - {"text"}:
        model.processor.require(kind)
    count = next(iter(sizes.values()), 1)
    items = {
        name: [*listed(value)] * (1 if name in sizes else count) for name, value in given.items()
    }
    kinds = [kind for kind in ("image", "audio") if kind in given]
    examples = [
        Example(
            (  # raw: a vector of the text alone, not of a chat around it
                Message(
                    RAW,
                    (
                        *(Media(kind, items[kind][i]) for kind in kinds),
                        *((Text(items["text"][i]),) if "text" in given else ()),
                    ),
                ),
            )
        )
        for i in range(count)
    ]
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
    found = torch.cat(vectors) if vectors else torch.zeros(0, model.spec.transformer.width)
    return found if sizes else found[0]
