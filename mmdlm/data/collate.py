"""Samples to rows of a model: media prepared, text and actions as token ids."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from encoders.features import Prepared
from mmdlm.data.dataset import Sample
from mmdlm.layout import GOLDEN, Row, Turn

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM

MEDIA_ORDER = ("image", "audio", "state")


@dataclass(frozen=True)
class Collated:
    """A batch of one data set before the encoders ran.

    Args:
        media: per modality the prepared items of all rows, in row order.
        turns: per row its turns as token ids.
        seeds: [B] int64, see `mmdlm.objectives.noise`.
        phase: [B] float64, see `mmdlm.objectives.objective.Batch`.
        groups: per row, for metrics.
        names: per row, token ids of what its media show: int64 [words] for audio, a list of such
            per token for a picture; empty where the data do not say.
    """

    media: dict[str, list[Prepared]]
    turns: list[tuple[Turn, ...]]
    seeds: Tensor
    phase: Tensor
    groups: tuple[str, ...]
    names: list[Tensor | list[Tensor]] = field(default_factory=list)


def collate(model: MultimodalDLM, samples: Items[Sample], seeds: Tensor, phase: Tensor) -> Collated:
    """One batch of samples that hold the same modalities.

    Raises:
        ValueError: the samples differ in what they hold, or an answer does not fit its canvas.
    """
    media: dict[str, list[Prepared]] = {}
    for kind in MEDIA_ORDER:
        items = [getattr(s, kind) for s in samples if getattr(s, kind) is not None]
        if items and len(items) != len(samples):
            raise ValueError(
                f"{len(items)} of {len(samples)} samples have {kind}; all or none must"
            )
        if items:
            media[kind] = [model.prepare(kind, item) for item in items]
    turns = [tuple(encode(model, turn) for turn in sample.turns) for sample in samples]
    names = [_names(model, s.names) for s in samples if s.names is not None]
    if names and len(names) != len(samples):
        raise ValueError(
            f"{len(names)} of {len(samples)} samples name their media; all or none must"
        )
    return Collated(media, turns, seeds, phase, tuple(s.group for s in samples), names)


def _names(model: MultimodalDLM, names: tuple) -> Tensor | list[Tensor]:
    if names and isinstance(names[0], tuple):
        return [_names(model, words) for words in names]
    return torch.tensor([model.tokenizer.id(word) for word in names], dtype=torch.long)


def encode(model: MultimodalDLM, turn: object) -> Turn:
    """Token ids of a turn, the answer completed with end tokens to its canvas."""
    answer = turn.answer
    if isinstance(answer, np.ndarray):
        if model.robot is None:
            raise ValueError("the data hold actions, the model has no robot statistics")
        ids = model.robot.encode(answer)
    else:
        ids = torch.tensor(model.tokenizer.encode(answer), dtype=torch.long)
    if len(ids) > turn.length:
        raise ValueError(
            f"answer {answer!r} has {len(ids)} tokens, its canvas {turn.length}; lengthen it"
        )
    end = torch.full((turn.length - len(ids),), model.spec.eos_id)
    return Turn(model.prompt(turn.prompt), torch.cat([ids, end]))


def rows(
    model: MultimodalDLM, batch: Collated
) -> tuple[list[Row], Tensor, Tensor, dict[str, list[Tensor]]]:
    """The rows of a batch with media encoded, each row's seed and phase, and the embeddings.

    The turns of a sample share one row where the model's attention allows it, else each turn
    becomes a row of its own.
    """
    encoded = {kind: model.encode(kind, items) for kind, items in batch.media.items()}
    parts = list(zip(*encoded.values(), strict=True)) if encoded else [()] * len(batch.turns)
    if model.spec.attention == "cascade":
        made = [Row(tuple(p), t) for p, t in zip(parts, batch.turns, strict=True)]
        return made, batch.seeds, batch.phase, encoded
    made, place, which = [], [], []
    for i, (part, turns) in enumerate(zip(parts, batch.turns, strict=True)):
        for j, turn in enumerate(turns):
            made.append(Row(tuple(part), (turn,)))
            place.append(i)
            which.append(j)
    turn = torch.tensor(which)
    # A turn's own seed, and the phase it would have as a branch of a shared row.
    seeds, phase = batch.seeds[place] + (turn << 40), (batch.phase[place] + GOLDEN * turn) % 1
    return made, seeds, phase, encoded
