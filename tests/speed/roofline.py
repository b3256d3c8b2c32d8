"""Roofline: the least time of a decode on a device, by arithmetic or memory traffic.

One forward of q query rows against k keys, of which r rows go through the head, costs

    FLOPs = 2 q body + 4 q k heads head_dim layers + 2 r D V
    bytes = weights of body and head, keys and values of k rows read and of q rows written, and
            activations, q layers (12 D + 4 inner) numbers written and read

and takes at least max(FLOPs / rate, bytes / bandwidth). This assumes perfect overlap, no launch
overhead and a free embedding, so it is a lower bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmdlm.backbones.config import TransformerConfig
from tests.speed.shapes import ACTION_IDS, Shape


@dataclass(frozen=True)
class Rates:
    """Rates of a device.

    Args:
        copy: bytes per second, read and written, of copying a large tensor.
        matmul: floating-point operations per second of multiplying large matrices.
    """

    copy: float
    matmul: float


# Measured with torch in bfloat16, not the data sheet.
H200 = Rates(copy=4.3e12, matmul=790e12)


@dataclass(frozen=True)
class Cost:
    """Work of one or several forwards.

    Args:
        flops: floating-point operations.
        bytes: read from and written to memory.
    """

    flops: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        """Least time on a device."""
        return max(self.flops / rates.matmul, self.bytes / rates.copy)


def body(config: TransformerConfig) -> int:
    """Number of matrix weights of the blocks, without norms and biases."""
    if config.moe is not None:
        raise ValueError("the roofline supports only dense models, this one has experts")
    q, kv = (config.head_width * n for n in (config.heads, config.keys_heads))
    attention = config.width * (2 * q + 2 * kv)
    return config.layers * (attention + 3 * config.width * config.inner)


def forward(
    config: TransformerConfig,
    q: int,
    k: int,
    r: int,
    *,
    batch: int = 1,
    columns: int | None = None,
    itemsize: int = 2,
) -> Cost:
    """The cost of one forward.

    Args:
        config: sizes of the model.
        q: query positions per batch row.
        k: keys per query.
        r: positions through the head; 0: the head is not read.
        batch: number of batch rows, which share the weights.
        columns: ids the head scores; None for the vocabulary.
        itemsize: bytes of a number.
    """
    head = config.width * (columns or config.vocab)
    attention = 4 * q * k * config.heads * config.head_width * config.layers
    flops = batch * (2 * q * body(config) + attention + 2 * r * head)
    weights = body(config) + (head if r else 0)
    kv = 2 * config.layers * config.keys_heads * config.head_width * (q + k)
    activations = q * config.layers * (12 * config.width + 4 * config.inner)
    return Cost(flops, itemsize * (weights + batch * (kv + activations)))


def forwards(shape: Shape, mode: str, steps: int | None = None, itemsize: int = 2) -> list[Cost]:
    """The cost of every forward of a decode.

    Prompts of unequal length count as their mean. The head runs on the open block.

    Args:
        shape: the shape.
        mode: see `systems.MODES`.
        steps: steps of the whole answer; required for a threshold, else those of the shape.
        itemsize: bytes of a number.
    Raises:
        ValueError: the shape has a threshold and no steps are given.
    """
    steps = steps or shape.steps
    if steps is None:
        raise ValueError(f"{shape.name} has no fixed number of steps; measure it first")
    prompt = round(sum(shape.prompts) / shape.batch)
    total, blocks = prompt + shape.length, shape.length // shape.block

    def one(q: int, k: int, r: int) -> Cost:
        columns = ACTION_IDS if shape.limited else None
        rows = {"batch": shape.batch, "columns": columns, "itemsize": itemsize}
        return forward(shape.transformer, q, k, r, **rows)

    if mode == "none":
        return [one(total, total, shape.block)] * steps
    if mode == "prefix-lm":
        return [one(prompt, prompt, 0)] + [one(shape.length, total, shape.block)] * steps
    costs = []
    for index in range(blocks):
        share = steps // blocks + (index < steps % blocks)
        rest = shape.length - index * shape.block
        rows = shape.block if mode == "dual" else rest
        opening = shape.length if mode == "prompt-once" and index else total
        costs += [one(opening, total, shape.block)] * min(share, 1)
        costs += [one(rows, total, shape.block)] * (share - 1)
    return costs


def floor(
    shape: Shape, mode: str, device: Rates, steps: int | None = None, itemsize: int = 2
) -> float:
    """The least seconds a decode can take.

    Args:
        shape: the shape.
        mode: see `systems.MODES`.
        device: rates of the device.
        steps: see `forwards`.
        itemsize: bytes of a number.
    """
    return sum(cost.seconds(device) for cost in forwards(shape, mode, steps, itemsize))


def rates(device: str, dtype: torch.dtype, seconds: float = 1.0) -> Rates:
    """Measures the rates of a device, as the best of repeated runs.

    Args:
        device: "cpu" or "cuda".
        dtype: type of the numbers.
        seconds: time for each of the two measurements.
    """
    is_gpu = torch.device(device).type == "cuda"
    # Larger than any cache, and matrices large enough that only arithmetic counts.
    count, side = (2**30, 8192) if is_gpu else (2**25, 1536)
    source = torch.ones(count, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), seconds, is_gpu)
    moved = 2 * source.numel() * dtype.itemsize
    a = torch.randn(side, side, device=device).to(dtype)
    product = torch.empty_like(a)
    multiplied = _best(lambda: torch.mm(a, a, out=product), seconds, is_gpu)
    return Rates(moved / copied, 2 * side**3 / multiplied)


def _best(run: Callable[[], object], seconds: float, is_gpu: bool) -> float:
    """Least seconds of a call, after one that does not count."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        if is_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if is_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best
