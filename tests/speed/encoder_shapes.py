"""Encoders of published sizes with random weights, and one input for each."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from encoders.encoder import Encoder


@dataclass(frozen=True)
class EncoderShape:
    """One encoder and its input.

    Args:
        name: name on the command line.
        about: description.
        make: creates the encoder with random weights.
        item: creates one raw item.
        count: items per batch.
    """

    name: str
    about: str
    make: Callable[[], Encoder]
    item: Callable[[], Any]
    count: int = 1

    def build(self, seed: int, device: str, dtype: torch.dtype) -> Callable[[], int]:
        """Returns a function that encodes the input once and returns the number of tokens."""
        torch.manual_seed(seed)
        encoder = self.make().eval().requires_grad_(False).to(device, dtype)
        item = encoder.prepare(self.item())
        prepared = [replace(item, tensor=item.tensor.to(device, dtype))] * self.count

        @torch.inference_mode()
        def encode() -> int:
            return int(encoder(prepared).mask.sum())

        return encode


def _siglip() -> Encoder:
    """The vision tower of LLaDA-V and LaViDa."""
    from encoders.vit import ViT

    return ViT("vit_so400m_patch14_siglip_384", act="gelu_tanh", layers=26)


def _small_vit() -> Encoder:
    from encoders.vit import ViT

    return ViT()


def _whisper() -> Encoder:
    """Sizes of openai/whisper-small: config.json."""
    from encoders.whisper import WhisperEncoder

    return WhisperEncoder(768, 12, 12)


def _image(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def _clip(seconds: float) -> tuple[np.ndarray, int]:
    noise = np.random.default_rng(0).standard_normal(int(16_000 * seconds))
    return 0.1 * noise.astype(np.float32), 16_000


_SHAPES = (
    EncoderShape("vit-64x1", "the default ViT, one image", _small_vit, lambda: _image(64)),
    EncoderShape("siglip-384x5", "SigLIP so400m, five views", _siglip, lambda: _image(384), 5),
    EncoderShape("whisper-s-30s", "Whisper small, 30 s", _whisper, lambda: _clip(30.0)),
)
ENCODERS = {shape.name: shape for shape in _SHAPES}


def find(names: Items[str]) -> list[EncoderShape]:
    """Encoder shapes by name.

    Raises:
        ValueError: there is no such shape.
    """
    for name in names:
        if name not in ENCODERS:
            near = difflib.get_close_matches(name, ENCODERS, 1, 0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"there is no encoder {name!r}; {hint}known: {', '.join(ENCODERS)}")
    return [ENCODERS[name] for name in names]
