"""Batches that cross between processes as one buffer.

A batch holds hundreds of small tensors. Each of them costs a shared-memory file, a file descriptor
in both processes and a message, together more than it takes to prepare the batch.
"""

from __future__ import annotations

import io
import pickle
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor

Form = tuple[torch.dtype, tuple[int, ...], tuple[tuple[int, ...], ...]]
"""Dtype, places in the order of the batch and shapes of the tensors of a part of the buffer."""
INLINE = 1 << 16
"""Bytes of the largest batch that is sent through the pipe, without a shared-memory file."""


class Transfer(dict):
    """A batch by data set that is pickled as one buffer of all its tensors, and all else as bytes.

    The tensors of an unpickled batch are views of the buffer.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Call of `_restore` that makes an equal batch; torch shares the tensor it is given."""
        file = io.BytesIO()
        pickler = _Pickler(file, pickle.HIGHEST_PROTOCOL)
        pickler.dump(dict(self))
        # The widest types first, so that all begin at a multiple of their width.
        order = sorted(
            enumerate(pickler.tensors),
            key=lambda pair: (-pair[1].element_size(), str(pair[1].dtype)),
        )
        total = sum(x.numel() * x.element_size() for x in pickler.tensors)
        buffer, forms, at = torch.empty(total, dtype=torch.uint8), [], 0
        for dtype, group in groupby(order, key=lambda pair: pair[1].dtype):
            places, tensors = zip(*group, strict=True)
            forms.append((dtype, places, tuple(tuple(tensor.shape) for tensor in tensors)))
            end = at + sum(x.numel() for x in tensors) * dtype.itemsize
            torch.cat([x.reshape(-1) for x in tensors], out=buffer[at:end].view(dtype))
            at = end
        small = len(buffer) <= INLINE
        data = buffer.numpy().tobytes() if small else buffer
        return _restore, (type(self), file.getvalue(), tuple(forms), data)

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
    kind: type[Transfer], pickled: bytes, forms: tuple[Form, ...], data: Tensor | bytes
) -> Transfer:
    """The batch of a buffer and all that is not a tensor."""
    if isinstance(data, bytes):  # copied, as tensors are writable
        data = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0)
    numels = [[torch.Size(shape).numel() for shape in shapes] for _, _, shapes in forms]
    widths = [sum(own) * form[0].itemsize for own, form in zip(numels, forms, strict=True)]
    tensors = {}
    for own, form, part in zip(numels, forms, data.split(widths), strict=True):
        dtype, places, shapes = form
        for place, shape, one in zip(places, shapes, part.view(dtype).split(own), strict=True):
            tensors[place] = one if len(shape) == 1 else one.view(shape)
    return kind(_Unpickler(io.BytesIO(pickled), tensors).load())
