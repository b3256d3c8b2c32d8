"""Batches that cross between processes as a few large tensors.

A batch holds hundreds of small tensors. Each of them costs a shared-memory file, a file descriptor
in both processes and a message, together more than it takes to prepare the batch.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor

Form = tuple[int, tuple[int, ...]]
"""Place of a tensor in the order of the batch, and its shape."""


class Transfer(dict):
    """A batch by data set that is pickled as its tensors joined per dtype, and all else as bytes.

    The tensors of an unpickled batch are views of the joined ones.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Call of `_restore` that makes an equal batch; torch moves the tensors it is given."""
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, pickle.HIGHEST_PROTOCOL)
        pickler.dump(dict(self))
        order = sorted(enumerate(pickler.tensors), key=lambda pair: str(pair[1].dtype))
        joined, forms = [], []
        for _, group in groupby(order, key=lambda pair: pair[1].dtype):
            places, tensors = zip(*group, strict=True)
            joined.append(torch.cat([tensor.reshape(-1) for tensor in tensors]))
            shapes = (tuple(tensor.shape) for tensor in tensors)
            forms.append(tuple(zip(places, shapes, strict=True)))
        return _restore, (type(self), buffer.getvalue(), tuple(forms), *joined)

    def copied(self) -> Self:
        """The batch as another process receives it."""
        make, given = self.__reduce__()
        return make(*given)


class _Pickler(pickle.Pickler):
    """Replaces each CPU tensor by its place in `tensors`; an object that occurs twice has one."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.tensors: list[Tensor] = []
        self.places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        """The place of a tensor; None for everything else, which is pickled."""
        if type(value) is not Tensor or value.device.type != "cpu" or value.requires_grad:
            return None
        if id(value) not in self.places:
            self.places[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.places[id(value)]


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back."""

    def __init__(self, file: io.BytesIO, tensors: dict[int, Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, place: int) -> Tensor:
        """The tensor of a place."""
        return self.tensors[place]


def _restore(
    kind: type[Transfer], pickled: bytes, forms: tuple[tuple[Form, ...], ...], *joined: Tensor
) -> Transfer:
    """The batch of joined tensors and all that is not a tensor."""
    tensors = dict(
        pair for form, one in zip(forms, joined, strict=True) for pair in _split(form, one)
    )
    return kind(_Unpickler(io.BytesIO(pickled), tensors).load())


def _split(form: tuple[Form, ...], joined: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Place and tensor of each part of a joined tensor."""
    sizes = [torch.Size(shape).numel() for _, shape in form]
    for (place, shape), part in zip(form, joined.split(sizes), strict=True):
        yield place, part if len(shape) == 1 else part.view(shape)
