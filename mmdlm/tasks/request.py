"""What is asked of a model, and the media it is about, each read and encoded once."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders.features import Prepared
from mmdlm.media import read_audio, read_image
from mmdlm.model import MultimodalDLM


@dataclass(frozen=True, eq=False)
class Request:
    """One answer to give.

    Args:
        prompt: the text before the canvas, in words or as ids int64 [n]; may be empty.
        canvas: int64 [G] ids; the mask id where something is to be filled in.
        media: (kind, item) in the order they are laid out.
    """

    prompt: str | Tensor
    canvas: Tensor
    media: tuple[tuple[str, Any], ...] = ()


def prepare(model: MultimodalDLM, kind: str, item: Any) -> Prepared:
    """One medium read and prepared, so that what is wrong with it shows before it joins a batch.

    Args:
        model: says how.
        kind: "image" or "audio".
        item: see `mmdlm.media.read_image` and `read_audio`; a `Prepared` of this kind is returned.
    Raises:
        ValueError: the model has no such encoder, or the item is not valid.
    """
    if isinstance(item, Prepared):
        if item.kind != kind:
            raise ValueError(f"expected {kind}, got a prepared {item.kind}")
        return item
    check_kind(model, kind)
    read = {"image": read_image, "audio": read_audio}.get(kind)
    return model.prepare(kind, item if read is None else read(item))


def check_kind(model: MultimodalDLM, kind: str) -> None:
    """Raises what `model.prepare` raises when the model has no encoder for this kind."""
    if kind not in model.encoders:
        model.prepare(kind, None)


class Encoded:
    """Embeddings of the media of one call, kept as long as a later request needs them.

    Args:
        model: the model.
        requests: all of the call.
    """

    def __init__(self, model: MultimodalDLM, requests: Items[Request]) -> None:
        self.model = model
        self.left = Counter((kind, _identity(i)) for r in requests for kind, i in r.media)
        self.content: dict[Hashable, Hashable] = {}
        self.uses: Counter[Hashable] = Counter()
        self.held: dict[Hashable, Tensor] = {}

    def take(self, requests: Items[Request], numbers: Items[int]) -> Taken:
        """The embeddings of a batch.

        Args:
            requests: of the batch.
            numbers: of the requests in the call, for errors.
        """
        new: dict[str, dict[Hashable, Prepared]] = {}
        for request, number in zip(requests, numbers, strict=True):
            for kind, item in request.media:
                key = (kind, _identity(item))
                if key in self.content:
                    continue
                try:
                    prepared = prepare(self.model, kind, item)
                except Exception as error:
                    error.add_note(f"This is the {kind} of item {number}, counted from 0.")
                    raise
                content = (kind, _digest(prepared))
                self.content[key] = content
                self.uses[content] += self.left[key]
                if content not in self.held:
                    new.setdefault(kind, {})[content] = prepared
        begin = time.perf_counter()
        for kind, waiting in new.items():
            embeddings = self.model.encode(kind, list(waiting.values()))
            self.held.update(zip(waiting, embeddings, strict=True))
        seconds = time.perf_counter() - begin
        parts = [
            tuple(self.held[self.content[kind, _identity(item)]] for kind, item in request.media)
            for request in requests
        ]
        for request in requests:
            for kind, item in request.media:
                content = self.content[kind, _identity(item)]
                self.uses[content] -= 1
                if not self.uses[content]:
                    del self.held[content]
        return Taken(parts, seconds)


@dataclass(frozen=True)
class Taken:
    """Embeddings [N D] of the media of each request, and the seconds the encoders took."""

    parts: list[tuple[Tensor, ...]]
    seconds: float


def _identity(item: Any) -> Hashable:
    """What tells two items of a call apart without reading them; the requests keep them alive."""
    return str(item) if isinstance(item, str | Path) else id(item)


def _digest(item: Prepared) -> tuple[bytes, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    data = item.tensor.contiguous().view(torch.uint8).numpy()
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return digest, tuple(item.tensor.shape), item.size, item.grid
