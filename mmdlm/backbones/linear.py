"""Matrix products with weights that a CPU may also hold in oneDNN's blocked layout.

The blocked layout makes products with few rows up to three times as fast and takes as much memory
again. A packed copy must not outlive a change of its weight, and a weight can change without any
trace in torch (`weight.data += d`, `weight.numpy()`, fused optimizers). So copies are used only
within `packed`, which compares a checksum of every weight with that of its copies on entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 2**18
"""Weights with fewer elements are not packed: the call costs more than the product saves."""

MOST = 4
"""Packed copies per weight: of all its rows, and of the slices used last."""

SEGMENT = 128
"""Elements per sum of a checksum."""

CHUNK = 2**21
"""Elements per tensor of sums: larger temporaries would raise the peak memory of a decode."""


PIECE = 128
"""Rows per piece of an MLP at inference on a CPU, so that the hidden activations, several times as
wide as a row, stay in the cache of a core."""


class Checksum(NamedTuple):
    """Version counter of a weight and sums of its bit patterns.

    A change goes unseen only if it bypasses the version counter and also keeps every sum, for
    example if it only swaps elements within segments.

    Args:
        version: number of tracked in-place changes; 0 if torch tracks none.
        sums: int64, the sum of the 64-bit words of each `SEGMENT` consecutive elements, in chunks.
        rest: int32, the bits of the remaining elements.
    """

    version: int
    sums: tuple[Tensor, ...]
    rest: Tensor

    def equals(self, other: Checksum | None) -> bool:
        """Whether the weights were equal."""
        if other is None or self.version != other.version:
            return False
        if len(self.sums) != len(other.sums) or not torch.equal(self.rest, other.rest):
            return False
        return all(map(torch.equal, self.sums, other.sums))


class Packs:
    """Packed copies of one weight; a copied or pickled weight has none.

    Attributes:
        copies: packed copies by the (start, stop) of their rows; None: all rows.
        checksum: of the weight they were made from.
    """

    def __init__(self) -> None:
        self.copies: dict[tuple[int, int] | None, Tensor] = {}
        self.checksum: Checksum | None = None

    def __reduce__(self) -> tuple[type[Packs], tuple[()]]:
        """Leaves out the copies, which oneDNN cannot serialize."""
        return Packs, ()


_ACTIVE: ContextVar[frozenset[Packs]] = ContextVar("packed weights", default=frozenset())
"""Packs that `packed` has checked in this context."""


def pack(module: nn.Module) -> None:
    """Allows `packed` to pack the large float32 weights of a module on a CPU.

    A copy is made at the first product in inference mode. A deep copy of a module is not packed.
    """
    for weight in module.parameters():
        is_plain = type(weight) is nn.Parameter and _can_pack(weight)
        if is_plain and weight.ndim == 2 and weight.numel() >= SMALLEST:
            weight.packs = Packs()


@contextmanager
def packed(module: object) -> Iterator[None]:
    """Uses packed weights within the context, in this thread.

    On entry, copies of weights that changed since are dropped. This reads weights with copies once,
    a few percent of the time of a decode. Within the context weights must not change.

    Args:
        module: the module that computes; a nested context of the same module checks nothing.
            Anything else than an `nn.Module`, such as a scripted model, has nothing to pack.
    """
    active = set(_ACTIVE.get())
    for weight in module.parameters() if isinstance(module, nn.Module) else ():
        packs = getattr(weight, "packs", None)
        if packs is None or packs in active:
            continue
        can_pack = _can_pack(weight)
        if packs.copies and not (can_pack and _checksum(weight).equals(packs.checksum)):
            packs.copies = {}
        if can_pack:
            active.add(packs)
    token = _ACTIVE.set(frozenset(active))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active() -> frozenset[Packs]:
    """The weights that `packed` has checked in this context, for `using`."""
    return _ACTIVE.get()


@contextmanager
def using(checked: frozenset[Packs]) -> Iterator[None]:
    """Uses packed weights that were checked before, without reading them again.

    Args:
        checked: of `active`; their weights have not changed since.
    """
    token = _ACTIVE.set(checked | _ACTIVE.get())
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: slice | None = None
) -> Tensor:
    """X @ weight.T + bias, [... N] for x [... K].

    Args:
        x: [... K].
        weight: [N K].
        bias: [N].
        rows: use only these rows of weight and bias.
    """
    part = weight if rows is None else weight[rows]
    if bias is not None and rows is not None:
        bias = bias[rows]
    if torch.compiler.is_compiling() or part.numel() < SMALLEST:
        return F.linear(x, part, bias)
    packs = getattr(weight, "packs", None)
    if packs is None or packs not in _ACTIVE.get() or not _is_inference(x):
        return F.linear(x, part, bias)
    key = None if rows is None else (rows.start, rows.stop)
    copy = packs.copies.pop(key, None)
    if copy is None:
        if not packs.copies:  # weights of which no copy is made, as of embeddings, are never read
            packs.checksum = _checksum(weight)
        copy = torch.ops.mkldnn._reorder_linear_weight(part.detach())
        for old in list(packs.copies)[: max(0, len(packs.copies) + 1 - MOST)]:
            packs.copies.pop(old, None)
    packs.copies[key] = copy  # the most recent one is last
    return torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is x @ weight.T + bias and nothing else, so that `linear` may stand for it.

    It is not if LoRA or a parametrization wraps it, or if its weight is quantized: then the layer
    itself must be called.
    """
    return type(layer) in (Linear, nn.Linear) and type(layer.weight) is nn.Parameter


def outputs(layer: nn.Module, x: Tensor, columns: slice | None = None) -> Tensor:
    """Output of a linear layer, or some of its columns only.

    Args:
        layer: see `is_plain`; any other layer computes all columns.
        x: [... K].
        columns: None for all.
    """
    if is_plain(layer):
        return linear(x, layer.weight, layer.bias, columns)
    y = layer(x)
    return y if columns is None else y[..., columns]


def _can_pack(weight: Tensor) -> bool:
    """Whether a weight has the type and layout of a packed copy's source."""
    is_float32 = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_float32 and weight.is_contiguous() and weight.storage_offset() % 2 == 0


def _checksum(weight: Tensor) -> Checksum:
    """Reads a weight once, as fast as memory allows."""
    bits = weight.detach().view(-1)
    whole = bits.numel() // SEGMENT * SEGMENT
    chunks = bits[:whole].split(CHUNK)
    sums = tuple(x.view(torch.int64).view(-1, SEGMENT // 2).sum(1) for x in chunks)
    version = 0 if weight.is_inference() else weight._version
    return Checksum(version, sums, bits[whole:].view(torch.int32).clone())


def _is_inference(x: Tensor) -> bool:
    """Whether a product with x may use a packed weight, which has no gradient."""
    return (
        torch.is_inference_mode_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


class Linear(nn.Linear):
    """`nn.Linear` whose weight may be packed."""

    def forward(self, x: Tensor) -> Tensor:
        """[... K] -> [... N]."""
        return linear(x, self.weight, self.bias)


class MLP(nn.Module):
    """SwiGLU with gate and up projections fused: down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * inner, bias=bias)
        self.down = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[... D] -> [... D]."""
        is_compiling = torch.compiler.is_compiling()
        if x.device.type == "cpu" and not is_compiling and torch.is_inference_mode_enabled():
            pieces = x.flatten(0, -2).split(PIECE)
            if len(pieces) > 1:
                return torch.cat([self(piece) for piece in pieces]).view(x.shape)
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
