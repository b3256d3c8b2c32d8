"""What a dataset hands to training and scoring: media, and the turns asked about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Turn:
    """One prompt about a sample's media and the answer that is to be filled in.

    Args:
        prompt: lower-case words separated by single spaces; may be empty.
        answer: text, or an action chunk, float32 [K A] in robot units.
        length: canvas of the answer in tokens; shorter answers are completed with end tokens.
    """

    prompt: str
    answer: str | np.ndarray
    length: int


@dataclass(frozen=True)
class Sample:
    """Media of one example with every turn asked about them; each turn is scored on its own.

    Args:
        turns: one or more prompts with their answers; they share the media, not each other.
        image: uint8 [Y X 3] RGB, or anything `encoders.encoder.Encoder.prepare` takes.
        audio: samples float32 [T] in [-1, 1] with their rate in Hz.
        state: float32 [S] in robot units.
        names: words the media show, where known: for a picture a tuple of words per token of its
            grid, row-major; for audio the words in the order they are spoken.
        group: name under which scores are averaged (a task, a kind of scene).
    """

    turns: tuple[Turn, ...]
    image: np.ndarray | None = None
    audio: tuple[np.ndarray, int] | None = None
    state: np.ndarray | None = None
    group: str = ""
    names: tuple[tuple[str, ...], ...] | tuple[str, ...] | None = None


class Dataset:
    """A finite, deterministic collection of samples.

    Subclasses give `__len__`, `sample` and `vocabulary`. A draw depends on the index and on the
    generator only, so a resumed or sharded run sees the samples an uninterrupted one sees.
    """

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} does not say its length; define __len__")

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """The sample at `index`; `rng` drives augmentation and the choice of questions only."""
        raise TypeError(f"{type(self).__name__} does not give samples; define sample(index, rng)")

    def vocabulary(self) -> list[str]:
        """Every word that prompts and text answers can hold, sorted."""
        raise TypeError(f"{type(self).__name__} does not say its words; define vocabulary()")
