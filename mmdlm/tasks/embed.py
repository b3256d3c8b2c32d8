"""Vectors of pictures, sounds and texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdlm.layout import Row
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import check_batch_size, listed
from mmdlm.tasks.request import Encoded, Request, check_kind

NO_CANVAS = torch.zeros(0, dtype=torch.long)


@torch.no_grad()
def embed(
    model: MultimodalDLM,
    *,
    image: Any = None,
    audio: Any = None,
    text: str | list[str] | None = None,
    batch_size: int = 16,
) -> Tensor:
    """A vector of unit length for a picture, a sound, a text, or several of them together.

    It is the mean of the backbone's final hidden states over all real tokens of the item (media,
    then text; no canvas, no padding), divided by its length. Models here are not trained for
    retrieval, so compare vectors of one model and one kind of input only.

    Args:
        model: the model.
        image: see `mmdlm.caption`; or a list.
        audio: see `mmdlm.transcribe`; or a list.
        text: words; or a list. Lists have one length; what is no list goes with all their items.
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
        check_kind(model, kind)
    count = next(iter(sizes.values()), 1)
    items = {
        name: [*listed(value)] * (1 if name in sizes else count) for name, value in given.items()
    }
    media = [kind for kind in ("image", "audio") if kind in given]
    requests = [
        Request(
            items["text"][i] if "text" in given else NO_CANVAS,
            NO_CANVAS,
            tuple((kind, items[kind][i]) for kind in media),
        )
        for i in range(count)
    ]
    encoded = Encoded(model, requests)
    vectors = [
        _vectors(model, requests[i : i + batch_size], encoded, i)
        for i in range(0, count, batch_size)
    ]
    found = torch.cat(vectors) if vectors else torch.zeros(0, model.spec.transformer.width)
    return found if sizes else found[0]


def _vectors(model: MultimodalDLM, requests: list[Request], encoded: Encoded, first: int) -> Tensor:
    """[B D] float32 vectors of a batch that begins with item `first` of the call."""
    taken = encoded.take(requests, range(first, first + len(requests)))
    texts = [  # a vector of the text alone, not of a chat around it
        model.prompt(r.prompt, chat=False) if isinstance(r.prompt, str) else r.prompt
        for r in requests
    ]
    rows = [Row((*parts, text)) for parts, text in zip(taken.parts, texts, strict=True)]
    sequence = model.arrange(rows)
    hidden = model.hidden(sequence).float() * sequence.mask[..., None]  # [B L D]
    return torch.nn.functional.normalize(hidden.sum(1), dim=1).cpu()
