"""Records what a vision transformer attends to, for pruners of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from encoders.encoder import Encoder
from encoders.features import Features


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


@contextmanager
def recorded(encoder: Encoder) -> Iterator[Attended]:
    """Within this context, the next forward of an encoder fills what is yielded.

    Args:
        encoder: an image encoder whose `attention_layer` is not None.

    Raises:
        ValueError: it has none.
    """
    layer = encoder.attention_layer
    if layer is None:
        raise ValueError(
            f"{type(encoder).__name__} records no attention, by which this pruner ranks; use "
            "divprune, pooling or uniform, or PruneMedia inside the language model"
        )
    projection, heads, skipped = layer
    found = Attended()

    def note(module: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
        q, k, _ = result.detach().unflatten(-1, (3, heads, -1)).unbind(-3)  # [B N H C]
        found.keys = k.mean(2)[:, skipped:]
        received = torch.zeros(k.shape[:2], device=k.device)
        for head in range(heads):  # one by one: [B N N] at a time
            scores = q[:, :, head].float() @ k[:, :, head].float().mT * k.shape[-1] ** -0.5
            received += scores.softmax(-1).mean(1)
        found.received = received[:, skipped:] / heads

    handle = projection.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()
