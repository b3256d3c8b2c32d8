"""Records what a vision transformer attends to, for pruners of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from encoders.encoder import Encoder
from encoders.features import Features

QUERIES = 2048
"""Most queries whose scores exist at a time."""


class Attended:
    """What one attention layer of an encoder saw in a forward.

    Attributes:
        keys: [B N C] attention keys, the mean over heads.
        received: [B N] attention that each token receives, the mean over heads and over the tokens
            that attend.
    """

    keys: Tensor
    received: Tensor

    def features(self, of: Features) -> Features:
        """Attention received, then keys, as "tokens" [B N 1+C] on the grid of an encoder's output.

        Args:
            of: what the encoder returned.
        """
        values = torch.cat([self.received[..., None], self.keys.float()], 2)
        return Features(values, of.mask, of.sizes)


_NOW: ContextVar[Attended | None] = ContextVar("recorded attention", default=None)


def recording() -> Attended | None:
    """What the forward that runs in this thread has to fill; None: nothing."""
    return _NOW.get()


def require_attention(encoder: Encoder) -> None:
    """Raises ValueError where an encoder does not record its attention."""
    if not encoder.records_attention:
        raise ValueError(
            f"{type(encoder).__name__} records no attention, by which this pruner ranks; use "
            "divprune, pooling or uniform, or PruneMedia inside the language model"
        )


@contextmanager
def recorded(encoder: Encoder) -> Iterator[Attended]:
    """Within this context, the next forward of an encoder fills what is yielded.

    Forwards of other threads are not recorded.

    Args:
        encoder: an image encoder that `records_attention`.

    Raises:
        ValueError: it does not.
    """
    require_attention(encoder)
    found, layer = Attended(), encoder.attention_layer
    handle = None if layer is None else layer[0].register_forward_hook(_Note(found, *layer[1:]))
    token = _NOW.set(found)
    try:
        yield found
    finally:
        _NOW.reset(token)
        if handle is not None:
            handle.remove()


class _Note:
    """Forward hook of a layer that projects [B N E] to queries, keys and values [B N 3*E].

    Args:
        found: filled.
        heads: attention heads.
        skipped: tokens that come before those that the encoder returns.
    """

    def __init__(self, found: Attended, heads: int, skipped: int) -> None:
        self.found, self.heads, self.skipped = found, heads, skipped

    def __call__(self, module: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
        """Notes keys and attention, if this is the forward of the thread that records."""
        if recording() is not self.found:
            return
        q, k, _ = result.detach().unflatten(-1, (3, self.heads, -1)).unbind(-3)  # [B N H C]
        self.found.keys = k.mean(2)[:, self.skipped :]
        rows = (received(q[i].transpose(0, 1), k[i].transpose(0, 1)) for i in range(len(q)))
        self.found.received = torch.stack(list(rows))[:, self.skipped :]


def received(queries: Tensor, keys: Tensor) -> Tensor:
    """[N] float32 attention that each token receives, the mean over heads and queries.

    Args:
        queries: [H N C].
        keys: [H N C].
    """
    total = torch.zeros(keys.shape[1], device=keys.device)
    for head, key in zip(queries.float(), keys.float(), strict=True):
        for part in head.split(QUERIES):
            total += (part @ key.mT * key.shape[-1] ** -0.5).softmax(-1).sum(0)
    return total / (queries.shape[0] * queries.shape[1])
