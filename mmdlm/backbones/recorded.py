"""Forwards over fixed memory, which a GPU repeats with one launch instead of hundreds.

A CUDA graph is a list of kernels with their arguments. It may be repeated as long as shapes and
addresses stay, so everything a step reads lies in buffers that outlive the decode: keys and values,
and the inputs. What changes from step to step, the rows at hand included, is data in them.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

from mmdlm.backbones.kv import KV

BUCKET = 256
"""Lengths of buffers are multiples of this, so that texts of similar length share recordings."""

MOST_ROWS = 512
"""Forwards of more rows are not recorded: launching them is nothing beside computing them."""

MOST_BUFFERS = 8
"""Buffers that are kept for later decodes; each holds the keys and values of a batch."""

MOST_STEPS = 16
"""Shapes of steps that are kept for one of them."""

Score = Callable[[Tensor, Tensor, KV, Tensor, Tensor, Tensor, slice | None], Tensor]
"""`Transformer.score`: ids, positions, kv, mask, rows, read, columns to logits."""


class Pool:
    """Buffers that no decode holds at present; a copied or pickled pool is empty."""

    def __init__(self) -> None:
        self.free: list[Buffers] = []
        self.lock = Lock()  # a server decodes in several threads

    def take(self, score: Score, make: Callable[[int, int], KV], batch: int, length: int) -> Lent:
        """Buffers for a decode, with what was recorded over them before.

        Args:
            score: what is recorded.
            make: (batch, length) to new keys and values on one device.
            batch: B.
            length: canvas length L.
        """
        size = -(-length // BUCKET) * BUCKET
        with self.lock:
            for i, buffers in enumerate(self.free):
                if buffers.fits(score, batch, size):
                    return Lent(self, self.free.pop(i).cleared(), make, length)
        with torch.inference_mode(False):  # what is made in it could not be written outside of it
            kv = make(batch, size)
        return Lent(self, Buffers(score, kv), make, length)

    def give(self, buffers: Buffers) -> None:
        """Takes buffers back; the longest unused ones go when there are too many."""
        with self.lock:
            self.free = [buffers, *self.free][:MOST_BUFFERS]

    def __deepcopy__(self, memo: dict) -> Pool:
        return Pool()

    def __reduce__(self) -> tuple[type[Pool], tuple[()]]:
        return Pool, ()


class Buffers:
    """Keys and values in fixed memory, and the steps recorded over them.

    Args:
        score: what is recorded.
        kv: the keys and values.
    """

    def __init__(self, score: Score, kv: KV) -> None:
        self.score, self.kv = score, kv
        self.steps: dict[tuple, Step] = {}

    def fits(self, score: Score, batch: int, length: int) -> bool:
        """Whether they are of this model as it is, for such a batch."""
        return score == self.score and (len(self.kv.keys[0]), self.kv.length) == (batch, length)

    def cleared(self) -> Buffers:
        """The same, empty: NaN that an earlier text left behind would pass through any mask."""
        for values in (*self.kv.keys, *self.kv.values):
            values.zero_()
        return self


class Step:
    """One forward over fixed inputs: recorded when it is asked for a second time.

    Args:
        buffers: whose keys and values it rewrites.
        ids: [B M] token ids, for the shape.
        read: [B R], for the shape.
        columns: ids to score.
        dtype: type of the mask.
    """

    def __init__(
        self, buffers: Buffers, ids: Tensor, read: Tensor, columns: slice | None, dtype: torch.dtype
    ) -> None:
        self.buffers, self.columns = buffers, columns
        size = buffers.kv.length
        with torch.inference_mode(False):
            self.inputs = [torch.zeros_like(x) for x in (ids, ids, ids, read)]
            self.mask = torch.zeros(*ids.shape, size, dtype=dtype, device=ids.device)
        self.recording: tuple[Callable[[], None], Tensor] | None = None
        self.calls = 0

    def __call__(self, *inputs: Tensor, seen: Tensor | None, end: int) -> Tensor:
        """Logits [B R V].

        Args:
            inputs: ids, positions, rows and read, see `Lent.score`.
            seen: [B M end] bool, keys that are attended; None for all of them.
            end: the buffers' keys from here on are not.
        """
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.mask.fill_(-torch.inf)
        inside = self.mask[:, :, :end]
        inside.zero_() if seen is None else inside.masked_fill_(seen, 0.0)
        self.calls += 1
        # Many shapes come once: of a prompt, or of a batch that shrinks. Not worth three forwards.
        if self.calls == 2:
            self.recording = record(self._forward, self.mask.device)
        if self.recording is None:
            return self._forward()
        replay, logits = self.recording
        replay()
        return logits.clone()  # the next step writes over it; strategies may keep what they saw

    def _forward(self) -> Tensor:
        ids, positions, rows, read = self.inputs
        kv = self.buffers.kv
        return self.buffers.score(ids, positions, kv, self.mask, rows, read, self.columns)


class Lent(KV):
    """The keys and values of one decode, in buffers that outlive it.

    Args:
        pool: where they come from and go to.
        buffers: the memory.
        make: see `Pool.take`.
        length: canvas length L; the buffers may be longer.
    """

    def __init__(
        self, pool: Pool, buffers: Buffers, make: Callable[[int, int], KV], length: int
    ) -> None:
        self.pool, self.make = pool, make
        self.length = self.end = length
        self.steady = False
        self._hold(buffers)

    def _hold(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self.keys, self.values = buffers.kv.keys, buffers.kv.values

    def score(
        self,
        ids: Tensor,
        positions: Tensor,
        rows: Tensor,
        read: Tensor,
        seen: Tensor | None,
        columns: slice | None,
    ) -> Tensor:
        """Logits [B R V] float32, with the keys and values of the rows rewritten.

        Args:
            ids: [B M] token ids of the rows.
            positions: [B M] their rotary positions.
            rows: [B M] where they are on the canvas.
            read: [B R] which of the M rows are scored.
            seen: [B M end] bool, keys they attend to; None for all up to `end`.
            columns: ids to score.
        """
        cut = None if columns is None else (columns.start, columns.stop)
        key = (ids.shape[1], read.shape[1], cut)
        steps = self.buffers.steps
        step = steps.pop(key, None) or Step(self.buffers, ids, read, columns, self.keys[0].dtype)
        steps[key] = step  # the latest comes last
        if len(steps) > MOST_STEPS:
            del steps[next(iter(steps))]
        return step(ids, positions, rows, read, seen=seen, end=self.end)

    def keep(self, rows: Tensor) -> None:
        """Moves some of the rows to buffers of their number."""
        old, at = self.buffers, rows.to(self.keys[0].device)
        fresh = self.pool.take(old.score, self.make, len(rows), self.length)
        for mine, theirs in zip(
            (*fresh.keys, *fresh.values), (*self.keys, *self.values), strict=True
        ):
            mine.copy_(theirs[at])
        self._hold(fresh.buffers)
        self.pool.give(old)

    def release(self) -> None:
        """Gives the buffers back."""
        self.pool.give(self.buffers)


def record(forward: Callable[[], Tensor], device: torch.device) -> tuple[Callable, Tensor] | None:
    """What repeats a forward, and where its result then stands; None where nothing records.

    Args:
        forward: reads and writes fixed memory only, and never waits for the device.
        device: where it runs.
    """
    if device.type != "cuda":
        return None
    beside = torch.cuda.Stream(device)  # libraries set themselves up in what runs first
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        forward()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = forward()
    return graph.replay, logits
