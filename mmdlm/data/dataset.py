"""What a data set hands to training and scoring."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from mmdlm.messages import Example, Media, Slot, Turn, assistant, user

if TYPE_CHECKING:
    from mmdlm.processor import Processor


def example(turns: Items[Turn], *, group: str = "", names: Any = None, **media: Any) -> Example:
    """An example in which every turn is about the same media and answered by itself.

    Args:
        turns: one or more questions with their answers: text, or an action chunk float32 [K A] in
            robot units.
        group: see `mmdlm.messages.Example`.
        names: see `mmdlm.messages.Example`.
        **media: item of each modality, or a list of items, in the order they are laid out.
    """
    shared = tuple(
        Media(kind, item)
        for kind, items in media.items()
        for item in (items if isinstance(items, list) else [items])
    )
    branches = tuple(
        (user(turn.prompt), assistant(Slot(_output(turn.answer), turn.length, turn.answer)))
        for turn in turns
    )
    return Example((user(*shared),) if shared else (), branches, group, names)


def _output(answer: Any) -> str:
    return "text" if isinstance(answer, str) else "actions"


class Extent(NamedTuple):
    """What decides how many tokens an example has: those of its longest branch.

    Args:
        prompt: all texts before the answer.
        answer: text of the answer.
        canvas: tokens of the answer's slot.
        media: number of items of each kind.
    """

    prompt: str
    answer: str
    canvas: int
    media: Mapping[str, int]


Preset = Mapping[str, Mapping[str, Any]]
"""Defaults per task, as `MultimodalDLM.preset`."""


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

    def accepted(self, index: int) -> list[str]:
        """All accepted answers of the last turn of an example, where the data list them."""
        return []

    def place(self, index: int) -> str:
        """Where the example at `index` comes from, for messages to the user."""
        return f"row {index + 1}"

    def extent(self, index: int) -> Extent | None:
        """Texts and media of the example at `index`, without opening media; None if not known."""
        return None

    def vocabulary(self) -> list[str]:
        """Every word that prompts and text answers can hold, sorted."""
        raise TypeError(f"{type(self).__name__} does not define vocabulary()")

    def texts(self, index: int) -> list[str]:
        """Prompts and text answers of the example at `index`, to train a tokenizer on."""
        turns = self.sample(index, np.random.default_rng(index)).turns
        return [text for turn in turns for text in turn[:2] if isinstance(text, str)]

    def connect(self, processor: Processor, preset: Preset | None = None) -> Self:
        """Called once before the first draw, for what only the model can know.

        Args:
            processor: of the model that is trained.
            preset: the model's defaults per task, such as "prompt" and "length".
        """
        return self

    def tasks(self) -> list[tuple[str, str | None, int]]:
        """(task, instruction or None, canvas length) of each task that the data teach.

        They become the model's defaults where it has none; called after `connect`.
        """
        return []


def __getattr__(name: str) -> Any:
    """Names of earlier editions, with what took their place."""
    if name == "Sample":
        raise ImportError(
            "mmdlm.data.dataset.Sample is now the function example(turns, **media); "
            "write `from mmdlm.data.dataset import Dataset, Turn, example`"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
