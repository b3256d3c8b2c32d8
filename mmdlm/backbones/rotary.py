"""Rotary position embedding (rotate-half form)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdlm.backbones.rope import RopeScaling


class Rotary(nn.Module):
    """Cosines and sines of absolute positions for the rotated channels of a head.

    Args:
        dim: channels of a head that are rotated.
        base: theta; channel pair i rotates by position * base ** (-2 i / dim).
        scaling: how config.json scales these frequencies; None for not at all. Where they depend
            on the length, it is that of the longest batch row of a forward, as in transformers.
    """

    def __init__(self, dim: int, base: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.dim, self.base, self.scaling = dim, base, scaling
        self.frequency: Tensor | None = None  # not a buffer: it would be cast with the weights
        self.factor = 1.0
        self.length: int | None = None

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Two float32 tensors [B 1 M dim] for positions [B M]: cosines, and sines for `rotate`.

        The sines of the first half are negated, as in rotate-half.
        """
        length = self._length(positions)
        is_known = self.frequency is not None and length == self.length
        if not is_known or self.frequency.device != positions.device:
            with torch.inference_mode(False):
                self._compute(positions.device, length)
        angles = positions[:, None, :, None].float() * self.frequency  # [B 1 M dim/2]
        cos, sin = angles.cos(), angles.sin()
        if self.factor != 1.0:
            cos, sin = cos * self.factor, sin * self.factor
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def _length(self, positions: Tensor) -> int | None:
        """Number of positions, where the frequencies depend on it."""
        bound = None if self.scaling is None else self.scaling.constant_up_to
        if bound is None or not positions.numel():
            return None
        length = int(positions.max()) + 1
        return length if length > bound else None

    def _compute(self, device: torch.device, length: int | None) -> None:
        """Sets the frequencies for a length, see `_length`."""
        self.length = length
        if self.scaling is not None:
            found, self.factor = self.scaling.frequencies(self.dim, self.base, length)
            self.frequency = found.to(device)
            return
        step = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        # In the published order of operations: base ** -x differs in the last bit, which shows
        # after thousands of positions.
        self.frequency = 1.0 / self.base ** (step / self.dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, float32: bool) -> Tensor:
    """Rotated queries or keys [B H M hd]; channels beyond the rotary width are not rotated."""
    dim = cos.shape[-1]
    rest = None
    if dim < x.shape[-1]:
        x, rest = x.split([dim, x.shape[-1] - dim], -1)
    head = x
    if x.dtype != torch.float32:
        if float32:
            head = x.float()
        else:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    low, high = head.chunk(2, -1)
    # In place where autograd allows it, to keep peak memory low for long prompts.
    head = (head * cos).add_(torch.cat([high, low], -1).mul_(sin)).to(x.dtype)
    return head if rest is None else torch.cat([head, rest], -1)
