"""Whisper's encoder (arXiv 2212.04356): log-mel frames to 50 tokens per second of audio."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from encoders.checks import Count, Factor
from encoders.encoder import Encoder
from encoders.features import Features, Prepared
from encoders.mel import HOP, RATE, LogMel, waveform

# Clips with a window keep this many frames after their end: an analysis window of 400 samples
# centred there still overlaps the clip, so these frames are not silence.
TAIL = 2


@dataclass(frozen=True)
class AudioInput:
    """Preprocessing of a clip: (samples, rate) to log-mel frames, without weights.

    With a window, two frames after the end of the clip are included.

    Args:
        mels: mel bands.
        seconds: window to which clips are padded with silence; None keeps each clip's length.
        longest: maximum duration in seconds.
    """

    mels: int
    seconds: float | None
    longest: float

    def __call__(self, item: Any) -> Prepared:
        """Frames [mels T] float32 of (samples, rate).

        Raises:
            TypeError: the item is not a pair of samples and rate.
            ValueError: see `encoders.mel.waveform`; for one, the clip exceeds `longest`.
        """
        # Resampling rounds the number of samples up, which may exceed the window by one.
        wave = waveform(item, longest=self.longest)[: round(self.longest * RATE)]
        mel = LogMel(self.mels, self.seconds)(wave)
        if self.seconds is not None:
            frames = math.ceil(len(wave) / HOP)
            mel = F.pad(mel, (0, TAIL))[:, : frames + TAIL]
        return Prepared("audio", mel)


class WhisperEncoder(Encoder):
    """Whisper's encoder: 50 tokens per second of speech or sound.

    With `seconds`, every clip is padded with silence to one window and attends to all of it, as the
    published weights were trained; the padding is masked afterwards. Without it, a clip is encoded
    at its original length, which is cheaper and suited to training from scratch. In both cases, the
    tokens of a clip do not depend on the batch.

    Args:
        dim: width E; even and divisible by `heads`.
        layers: transformer blocks.
        heads: attention heads.
        mels: mel bands of the input.
        seconds: window of the published weights (30), or None.
        hidden: width of the feed-forward layer; None for four times `dim`.
        positions: length of the position table, 50 per second of the longest clip.
        hidden_layers: layers whose outputs are returned in `Features.hidden`, in this order,
            numbered as transformers' `hidden_states`: 0 the convolutions with positions, i the
            output of layer i, `layers` the final norm. Needs `seconds`.
    Raises:
        ValueError: sizes that do not fit one another, or a hidden layer outside 0 to `layers`.
    """

    kind: ClassVar[str] = "audio"
    KEYS: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "conv1.weight": "model.encoder.conv1.weight",
        "conv1.bias": "model.encoder.conv1.bias",
        "conv2.weight": "model.encoder.conv2.weight",
        "conv2.bias": "model.encoder.conv2.bias",
        "positions": "model.encoder.embed_positions.weight",
        "blocks.{i}.norm1.weight": "model.encoder.layers.{i}.self_attn_layer_norm.weight",
        "blocks.{i}.norm1.bias": "model.encoder.layers.{i}.self_attn_layer_norm.bias",
        "blocks.{i}.q.weight": "model.encoder.layers.{i}.self_attn.q_proj.weight",
        "blocks.{i}.q.bias": "model.encoder.layers.{i}.self_attn.q_proj.bias",
        "blocks.{i}.k.weight": "model.encoder.layers.{i}.self_attn.k_proj.weight",
        "blocks.{i}.v.weight": "model.encoder.layers.{i}.self_attn.v_proj.weight",
        "blocks.{i}.v.bias": "model.encoder.layers.{i}.self_attn.v_proj.bias",
        "blocks.{i}.out.weight": "model.encoder.layers.{i}.self_attn.out_proj.weight",
        "blocks.{i}.out.bias": "model.encoder.layers.{i}.self_attn.out_proj.bias",
        "blocks.{i}.norm2.weight": "model.encoder.layers.{i}.final_layer_norm.weight",
        "blocks.{i}.norm2.bias": "model.encoder.layers.{i}.final_layer_norm.bias",
        "blocks.{i}.up.weight": "model.encoder.layers.{i}.fc1.weight",
        "blocks.{i}.up.bias": "model.encoder.layers.{i}.fc1.bias",
        "blocks.{i}.down.weight": "model.encoder.layers.{i}.fc2.weight",
        "blocks.{i}.down.bias": "model.encoder.layers.{i}.fc2.bias",
        "norm.weight": "model.encoder.layer_norm.weight",
        "norm.bias": "model.encoder.layer_norm.bias",
    }

    def __init__(
        self,
        dim: Count = 384,
        layers: Count = 4,
        heads: Count = 6,
        mels: Count = 80,
        seconds: Factor | None = 30.0,
        hidden: Count | None = None,
        positions: Count = 1500,
        hidden_layers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if dim % heads or dim % 2 or dim < 4:
            raise ValueError(
                f"WhisperEncoder: dim is {dim}, expected an even multiple of heads ({heads})"
            )
        self.dim, self.mels, self.seconds = dim, mels, seconds
        self.window = None if seconds is None else round(seconds * RATE) // HOP  # frames
        if self.window is not None and self.window > 2 * positions:
            raise ValueError(
                f"WhisperEncoder: seconds={seconds} needs {math.ceil(self.window / 2)} positions, "
                f"got positions={positions}"
            )
        wrong = [i for i in hidden_layers if not 0 <= i <= layers]
        if wrong or (hidden_layers and seconds is None):
            raise ValueError(
                f"WhisperEncoder: hidden_layers={list(hidden_layers)} with layers={layers} and "
                f"seconds={seconds}; expected numbers from 0 to {layers}, and a window in seconds"
            )
        self.hidden_layers = tuple(hidden_layers)
        self.longest = positions * 2 * HOP / RATE if seconds is None else seconds  # seconds
        LogMel(mels, seconds)  # validates the window
        self.preprocess = AudioInput(mels, seconds, self.longest)
        self.conv1 = nn.Conv1d(mels, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.register_buffer("positions", sinusoids(positions, dim))
        self.blocks = nn.ModuleList(_Block(dim, heads, hidden or 4 * dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, items: Sequence[Prepared]) -> Features:
        """Features of prepared clips.

        Args:
            items: log-mel frames [mels T] each.
        Returns:
            tokens [B N E], cut to the longest clip of the batch; the hidden states [B N' E] of
            `hidden_layers` over the whole window.
        """
        frames = self._frames(items)
        hidden = {}
        for layer, state in enumerate(self._states(items, frames)):
            if layer in self.hidden_layers:
                hidden[layer] = state
            last = state
        lengths = (frames - 1) // 2 + 1
        last = last[:, : int(lengths.max())]  # [B N E]
        at = torch.arange(last.shape[1], device=last.device)
        chosen = tuple(hidden[layer] for layer in self.hidden_layers)
        return Features(last, at < lengths.to(last.device)[:, None], hidden=chosen or None)

    def states(self, items: Sequence[Prepared]) -> list[Tensor]:
        """Hidden states of all layers, [B N E] each, numbered as `hidden_layers`.

        N is the whole window, or the longest clip without one; nothing is cut or masked. Without a
        window, the states after the end of a shorter clip are undefined.
        """
        return list(self._states(items, self._frames(items)))

    @classmethod
    def tiny(cls) -> Self:
        """A random two-layer encoder of width 64 for clips of up to four seconds."""
        return cls(dim=64, layers=2, heads=4, seconds=None, positions=200)

    @staticmethod
    def example(seed: int = 0) -> tuple[np.ndarray, int]:
        """A chord in noise, 0.5 to 1 second at 16 kHz."""
        rng = np.random.default_rng(seed)
        time = np.arange(rng.integers(8000, 16000)) / RATE
        tones = [np.sin(2 * np.pi * hertz * time) for hertz in rng.uniform(100, 2000, 3)]
        noise = rng.standard_normal(len(time))
        return (0.2 * np.sum(tones, axis=0) + 0.02 * noise).astype(np.float32), RATE

    def _frames(self, items: Sequence[Prepared]) -> Tensor:
        """Frames of each clip without padding, int64 [B]."""
        if not items:
            raise ValueError("WhisperEncoder: no clips, expected at least one")
        tail = 0 if self.window is None else TAIL
        most = self.window or 2 * len(self.positions)
        mels = [item.tensor for item in items]
        for index, mel in enumerate(mels):
            if mel.ndim != 2 or len(mel) != self.mels or not 0 < mel.shape[1] - tail <= most:
                raise ValueError(
                    f"WhisperEncoder: clip {index} is {list(mel.shape)}, expected [{self.mels} T] "
                    f"with {1 + tail} to {most + tail} frames; pass the output of prepare()"
                )
        return torch.tensor([mel.shape[1] - tail for mel in mels])

    def _batch(self, items: Sequence[Prepared]) -> Tensor:
        """Frames [B mels T], padded with silence to the window or with zeros to the longest."""
        mels = [item.tensor.to(self.conv1.weight) for item in items]
        if self.window is None:
            return rearrange(pad_sequence([mel.T for mel in mels], True), "b t c -> b c t")
        batch = []
        for mel in mels:
            # Value of digital silence after the front end's -8 floor and (x + 4) / 4.
            silence = (mel.max() - 2).clamp(min=-1.5)
            clip = mel[:, : self.window]
            rest = silence.expand(self.mels, self.window - clip.shape[1])
            batch.append(torch.cat([clip, rest], dim=1))
        return torch.stack(batch)

    def _states(self, items: Sequence[Prepared], frames: Tensor) -> Iterator[Tensor]:
        x = F.gelu(self.conv1(self._batch(items)))  # [B E T]
        keys = None
        if self.window is None and frames.min() < frames.max():
            frames = frames.to(x.device)[:, None]
            at = torch.arange(x.shape[2], device=x.device)
            # A clip alone has zeros after its end at the second convolution, not conv1's bias.
            x = x * (at < frames)[:, None]
            keys = (at[::2] < frames)[:, None, None]  # [B 1 1 N]
        x = rearrange(F.gelu(self.conv2(x)), "b e n -> b n e")  # [B N E]
        x = x + self.positions[: x.shape[1]]
        for block in self.blocks:
            yield x
            x = block(x, keys)
        yield self.norm(x)


class _Block(nn.Module):
    """Pre-norm attention and feed-forward layer; keys have no bias, as in Whisper."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            rearrange(part(y), "b n (h e) -> b h n e", h=self.heads)
            for part in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        x = x + self.out(rearrange(y, "b h n e -> b n (h e)"))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def sinusoids(length: int, dim: int) -> Tensor:
    """Fixed position embeddings, float32 [length dim]: sines, then cosines (Whisper)."""
    if torch.get_default_device().type == "meta":  # where arithmetic would import torch._dynamo
        return torch.empty(length, dim)
    half = dim // 2
    speeds = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
    angles = torch.arange(length)[:, None] * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=1)
