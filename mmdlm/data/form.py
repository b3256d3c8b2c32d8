"""The form in which conversations become training rows."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from encoders.checks import Checked, NonNegativeInt, PositiveInt
from mmdlm.layout import Row, Turn
from mmdlm.messages import RAW, Example, Media, Message, Slot, Text
from mmdlm.processor import Processor


@dataclass(frozen=True)
class Form(Checked):
    """Which answers of a conversation are learnt, and what follows them.

    Args:
        turns: see `mmdlm.training.data.Data`.
        end_of_turn: see `mmdlm.training.data.Data`.
        tail: see `mmdlm.training.data.Data`.
        pad: see `mmdlm.training.data.Data`.
        also: see `mmdlm.training.data.Data`.
    Raises:
        ValueError: `tail` and `pad` are both given.
    """

    turns: Literal["all", "one", "plain"] = "all"
    end_of_turn: bool = False
    tail: PositiveInt | None = None
    pad: NonNegativeInt | None = None
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tail is not None and self.pad is not None:
            raise ValueError("tail and pad both decide what follows an answer; keep one")

    def of(self, sample: Example, processor: Processor, rng: np.random.Generator) -> Example:
        """A sample of a data set in this form.

        Args:
            sample: with answers.
            processor: of the model.
            rng: of the turn and the number of end tokens.
        Raises:
            ValueError: the model has no end of a turn, or an answer does not fit its slot.
        """
        if self.turns != "all":
            all_turns = sample.conversations
            picked = int(rng.integers(len(all_turns))) if self.turns == "one" else None
            chosen = all_turns if picked is None else all_turns[picked : picked + 1]
            change = _alone if self.turns == "one" else _plain
            sample = replace(sample, messages=(), branches=tuple(map(change, chosen)))
        if (self.tail, self.pad, self.end_of_turn) == (None, None, False):
            return sample

        def ended(message: Message) -> Message:
            parts = (self._ended(part, processor, rng) for part in message.parts)
            return replace(message, parts=tuple(parts))

        branches = tuple(tuple(map(ended, branch)) for branch in sample.branches)
        return replace(sample, messages=tuple(map(ended, sample.messages)), branches=branches)

    def _ended(self, part: Any, processor: Processor, rng: np.random.Generator) -> Any:
        """A slot of a text with its end of a turn and end tokens; other parts are unchanged."""
        is_text = isinstance(part, Slot) and part.output == "text" and part.value is not None
        if not is_text or part.known is not None:  # a scaffold has its end
            return part
        spec, length = processor.spec, part.length
        if isinstance(part.value, str):
            ids = processor.encode(part.value)
        else:  # ids that are followed by end tokens already
            length, kept = len(part.value), (part.value != spec.eos_id).nonzero()
            ids = part.value[: int(kept.max()) + 1 if len(kept) else 0]
        if self.end_of_turn:
            ids = torch.cat([ids, torch.tensor([end_of_turn(processor)])])
        if length is not None and len(ids) > length:
            end = " with the end of its turn" if self.end_of_turn else ""
            raise ValueError(
                f"answer {part.value!r} has {len(ids)} tokens{end}, but its slot only {length}"
            )
        size = len(ids) if self.pad is not None or length is None else length
        if self.tail is not None:
            own = len(ids) + int(rng.integers(1, self.tail + 1))
            size = own if length is None else min(length, own)
        rest = torch.full((size - len(ids),), spec.pad_id if self.end_of_turn else spec.eos_id)
        return replace(part, value=torch.cat([ids, rest]), length=size)

    def ids(self, processor: Processor) -> tuple[int, ...]:
        """Token ids of `also`.

        Raises:
            ValueError: one of the texts is not a single token.
        """
        found = {text: processor.encode(text).tolist() for text in self.also}
        for text, ids in found.items():
            if len(ids) != 1:
                raise ValueError(f"also holds {text!r}, which has {len(ids)} tokens, expected one")
        return tuple(ids[0] for ids in found.values())

    def extra(self, rng: np.random.Generator) -> int | None:
        """Padding tokens after the longest row of a batch; None: rows are not extended."""
        if self.pad is None:
            return None
        return max(0, int(rng.integers(-self.pad, self.pad))) if self.pad else 0


@lru_cache(maxsize=4)
def end_of_turn(processor: Processor) -> int:
    """The end token that the chat template writes after a message of the assistant.

    Raises:
        ValueError: there is no template, or it writes none of `Spec.eos_id` and `Spec.stop_ids`.
    """
    talk = [Message(role, (Text("a"),)) for role in ("user", "assistant", "user")]
    ends = {processor.spec.eos_id, *processor.spec.stop_ids}
    parts = () if processor.jinja is None else processor.prompt(tuple(talk))
    found = [i for part in parts for i in part.tolist() if i in ends]
    if not found:
        raise ValueError("end_of_turn: the chat template of this model has no token for it")
    return found[0]


def extended(rows: Items[Row], extra: int, pad: int) -> list[Row]:
    """Rows whose answers are followed by padding, all as long as the longest and `extra`.

    Source: the collators of jacklishufan/LaViDa: llava/train/train.py, ML-GSAI/LLaDA-V:
    train/llava/train/train.py and DreamLM/Dream-VLX: vl/train/llava/train/train.py.

    Args:
        rows: with encoded media and one turn each.
        extra: padding tokens after the longest row.
        pad: the padding token.
    Raises:
        ValueError: a row has several turns.
    """
    if any(len(row.turns) != 1 for row in rows):
        raise ValueError("pad needs rows with one answer; leave it out for this data set")
    size = max(row.length for row in rows) + extra
    found = []
    for row in rows:
        turn, more = row.turns[0], torch.full((size - row.length,), pad)
        found.append(replace(row, turns=(Turn(turn.prompt, torch.cat([turn.answer, more])),)))
    return found


def _alone(messages: Items[Message]) -> tuple[Message, ...]:
    """A question with its answer and without the turns before it, whose media precede it.

    Source: jacklishufan/LaViDa: llava/train/train.py, preprocess_llada.
    """
    *before, question, answer = messages
    media = _media(before)
    system = [message for message in before if message.role == "system"]
    return (*system, replace(question, parts=(*media, *question.parts)), answer)


def _plain(messages: Items[Message]) -> tuple[Message, ...]:
    """Media and the answer with a line break, without template and question.

    Source: jacklishufan/LaViDa: llava/train/train.py, preprocess_plain.
    """
    *before, answer = messages
    parts = (
        replace(part, value=f"{part.value}\n")
        if isinstance(part, Slot) and isinstance(part.value, str)
        else part
        for part in answer.parts
    )
    return (Message(RAW, tuple(_media(before))), replace(answer, parts=tuple(parts)))


def _media(messages: Items[Message]) -> list[Media]:
    return [part for m in messages for part in m.parts if isinstance(part, Media)]
