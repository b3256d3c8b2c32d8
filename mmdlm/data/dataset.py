"""What a data set hands to training and scoring."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from mmdlm.messages import Example, Media, Slot, Turn, assistant, user


def example(turns: Items[Turn], *, group: str = "", names: Any = None, **media: Any) -> Example:
    """An example in which every turn is about the same media and answered by itself.

    Args:
        turns: one or more questions with their answers: text, or an action chunk float32 [K A] in
            robot units.
        group: see `mmdlm.messages.Example`.
        names: see `mmdlm.messages.Example`.
        **media: item of each modality, in the order they are laid out.
    """
    shared = tuple(Media(kind, item) for kind, item in media.items())
    branches = tuple(
        (user(turn.prompt), assistant(Slot(_output(turn.answer), turn.length, turn.answer)))
        for turn in turns
    )
    return Example((user(*shared),) if shared else (), branches, group, names)


def _output(answer: Any) -> str:
    return "text" if isinstance(answer, str) else "actions"


class Dataset:
    """A finite, deterministic collection of examples.

    Subclasses define `__len__`, `sample` and `vocabulary`. A draw depends on the index and on the
    generator only, so a resumed or sharded run sees the examples an uninterrupted one sees.
    """

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} does not define __len__")

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        """The example at `index`; `rng` drives augmentation and the choice of questions only."""
        raise TypeError(f"{type(self).__name__} does not define sample(index, rng)")

    def vocabulary(self) -> list[str]:
        """Every word that prompts and text answers can hold, sorted."""
        raise TypeError(f"{type(self).__name__} does not define vocabulary()")
