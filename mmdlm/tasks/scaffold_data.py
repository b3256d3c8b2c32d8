"""Training on scaffolds: the structure of a JSON answer is given, only its values are learned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from mmdlm.data.dataset import Dataset, Extent, Preset
from mmdlm.messages import Example, Message, Slot
from mmdlm.processor import Processor
from mmdlm.tasks.scaffold import Leaf, Scaffold, pieces, scaffold
from mmdlm.tasks.schema import STRING, Pick, parse


class Scaffolds(Dataset):
    """Turns JSON answers into canvases as `mmdlm.infill(schema)` decodes them.

    Every value has the slot that it has in decoding. The text around the slots is never masked and
    not learned, as in SaFo-Lab/dVLM-AD, where only the masks of the values are written.

    Args:
        dataset: examples whose answers are JSON texts that conform to the schema.
        schema: JSON file with the schema, or the schema; see `mmdlm.tasks.schema.parse`.
        slot: see `mmdlm.infill`.
        fence: see `mmdlm.infill`.

    Raises:
        ValueError: the schema is not supported.
    """

    def __init__(
        self,
        dataset: Dataset,
        schema: Path | dict[str, Any],
        slot: int = STRING,
        fence: bool = False,
    ) -> None:
        if not isinstance(schema, Mapping):
            schema = json.loads(Path(schema).read_text(encoding="utf-8"))
        self.dataset, self.schema = dataset, schema
        self.slot, self.fence = slot, fence
        self.root = parse(schema, slot)
        self.processor: Processor | None = None
        self.canvas: Scaffold | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def connect(self, processor: Processor, preset: Preset | None = None) -> Self:
        """See `Dataset.connect`.

        Raises:
            ValueError: the vocabulary of the model cannot represent JSON.
        """
        self.dataset.connect(processor, preset)
        self.processor = processor
        self.canvas = scaffold(processor, self.schema, self.slot, self.fence)
        return self

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        """The example at `index`; its answers are canvases once `connect` was called.

        Raises:
            ValueError: an answer does not conform to the schema, or a value does not fit its slot.
        """
        found = self.dataset.sample(index, rng)
        if self.canvas is None:
            return found
        try:
            messages = tuple(map(self._message, found.messages))
            branches = tuple(tuple(map(self._message, branch)) for branch in found.branches)
        except ValueError as error:
            raise ValueError(f"{self.place(index)}: {error}") from error
        return replace(found, messages=messages, branches=branches)

    def _message(self, message: Message) -> Message:
        parts = (self._slot(p) if isinstance(p, Slot) else p for p in message.parts)
        return replace(message, parts=tuple(parts))

    def _slot(self, slot: Slot) -> Slot:
        """The slot with the canvas of its JSON text."""
        ids = self.canvas.filled(self.processor.tokenizer, json.loads(slot.value))
        return Slot(slot.output, len(ids), ids, self.canvas.is_known)

    def place(self, index: int) -> str:
        """See `Dataset.place`."""
        return self.dataset.place(index)

    def extent(self, index: int) -> Extent | None:
        """See `Dataset.extent`."""
        found = self.dataset.extent(index)
        size = 0 if self.canvas is None else len(self.canvas.tokens)
        return None if found is None else found._replace(canvas=size)

    def vocabulary(self) -> list[str]:
        """See `Dataset.vocabulary`."""
        return self.dataset.vocabulary()

    def texts(self, index: int) -> list[str]:
        """Prompts, and the texts of the scaffold with their values, as they are tokenized.

        The "examples" of strings in the schema are included, so that a vocabulary trained on few
        rows has their words.
        """
        found = self.dataset.sample(index, np.random.default_rng(index))
        texts = list(_examples(self.schema))
        for turn in found.turns:
            texts += [turn.prompt, *_strings(json.loads(turn.answer))]
            texts += [text for piece in pieces(self.root, self.fence) for text in _texts(piece)]
        return [text for text in texts if text]

    def tasks(self) -> list[tuple[str, str | None, int]]:
        """See `Dataset.tasks`."""
        return [("infill", None, len(self.canvas.tokens))]


def _texts(piece: str | Leaf) -> list[str]:
    """Known texts of a piece of a scaffold, and the options of a choice."""
    if isinstance(piece, str):
        return [piece]
    quote = '"' * piece.is_quoted
    options = piece.options if isinstance(piece.node, Pick) else ()
    return [piece.before + quote, *(text.strip('"') for text in options), quote + piece.after]


def _examples(schema: Any) -> Iterator[str]:
    """Every string that a schema gives as an example."""
    if isinstance(schema, Mapping):
        yield from _strings(schema.get("examples", []))
        for part in schema.values():
            yield from _examples(part)


def _strings(value: Any) -> Iterator[str]:
    """All texts in a JSON value, as JSON writes them between quotes."""
    if isinstance(value, str):
        yield json.dumps(value, ensure_ascii=False)[1:-1]
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(each)
