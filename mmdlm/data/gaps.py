"""LaViDa's text infilling: answers with gaps, which end in a given token."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from encoders.checks import CountOrZero, UnitFloat
from mmdlm.data.dataset import Dataset, Preset
from mmdlm.messages import Example, Message, Slot
from mmdlm.processor import Processor


class Gaps(Dataset):
    """Inserts gaps that hold nothing into text answers, so that a model learns to leave gaps empty.

    With probability `share`, an answer of more than three words gets 1 to N gaps after distinct
    words, N = a tenth of the words, at least 5 and at most 10. A gap is 0 to `fillers` filler
    tokens and one end token. Train with `mmdlm.objectives.given.Given` and the end's id, so that
    the ends are given and the fillers learnt. The canvas of an answer grows by its gaps.

    Source: jacklishufan/LaViDa: llava/train/train.py.

    Args:
        dataset: examples whose answers are texts.
        end: token that ends a gap (LaViDa: <|reserved_token_1|>).
        filler: token that fills a gap (LaViDa: <|reserved_token_2|>).
        share: of the answers that get gaps.
        fillers: most filler tokens of a gap.
    """

    def __init__(
        self,
        dataset: Dataset,
        end: str = "<|reserved_token_1|>",
        filler: str = "<|reserved_token_2|>",
        share: UnitFloat = 0.8,
        fillers: CountOrZero = 5,
    ) -> None:
        self.dataset, self.end, self.filler = dataset, end, filler
        self.share, self.fillers = share, fillers
        self.processor: Processor | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def connect(self, processor: Processor, preset: Preset | None = None) -> Self:
        """See `Dataset.connect`.

        Raises:
            ValueError: the tokenizer lacks one of the two tokens.
        """
        self.dataset.connect(processor, preset)
        known = () if processor.tokenizer is None else processor.tokenizer.added
        if missing := [token for token in (self.end, self.filler) if token not in known]:
            raise ValueError(
                f"Gaps: the tokenizer has no token {' or '.join(missing)}; give end= and filler=, "
                "two tokens that no text uses"
            )
        self.processor = processor
        return self

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        """The example at `index`, its answers with gaps."""
        found = self.dataset.sample(index, rng)
        branches = tuple(
            tuple(self._message(message, rng) for message in branch) for branch in found.branches
        )
        messages = tuple(self._message(message, rng) for message in found.messages)
        return replace(found, messages=messages, branches=branches)

    def place(self, index: int) -> str:
        """See `Dataset.place`."""
        return self.dataset.place(index)

    def vocabulary(self) -> list[str]:
        """See `Dataset.vocabulary`."""
        return self.dataset.vocabulary()

    def tasks(self) -> list[tuple[str, str | None, int]]:
        """See `Dataset.tasks`."""
        return self.dataset.tasks()

    def _message(self, message: Message, rng: np.random.Generator) -> Message:
        parts = tuple(
            self._slot(part, rng)
            if isinstance(part, Slot) and isinstance(part.value, str)
            else part
            for part in message.parts
        )
        return replace(message, parts=parts)

    def _slot(self, slot: Slot, rng: np.random.Generator) -> Slot:
        """The slot with gaps in its text, or as it is."""
        words = [match.end() for match in re.finditer(r"\S+", slot.value)]
        if len(words) <= 3 or rng.random() >= self.share:
            return slot
        most = min(max(5, int(0.1 * len(words))), 10, len(words))
        chosen = rng.choice(len(words), int(rng.integers(1, most + 1)), replace=False)
        ids, start = [], 0
        end, filler = (self.processor.tokenizer.id(token) for token in (self.end, self.filler))
        gaps = 0
        for at in sorted(words[i] for i in chosen):
            gap = [filler] * int(rng.integers(self.fillers + 1)) + [end]
            ids += [self.processor.encode(slot.value[start:at]), torch.tensor(gap)]
            start, gaps = at, gaps + len(gap)
        ids.append(self.processor.encode(slot.value[start:]))
        return replace(slot, value=self._padded(torch.cat(ids), slot.length, gaps))

    def _padded(self, ids: Tensor, length: int | None, gaps: int) -> Tensor:
        """Token ids followed by end tokens up to a canvas that is longer by the gaps."""
        size = max(len(ids) + 1, (length or 0) + gaps)
        return torch.cat([ids, torch.full((size - len(ids),), self.processor.spec.eos_id)])
