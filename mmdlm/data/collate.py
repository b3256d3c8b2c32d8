"""Examples of a data set as one batch of a model."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdlm.data.form import extended
from mmdlm.layout import ANSWER, TOKEN, Row, Sequence, Turn
from mmdlm.messages import Example
from mmdlm.objectives.draw import GOLDEN
from mmdlm.objectives.objective import Batch
from mmdlm.objectives.packing import Packing, bins
from mmdlm.processor import Packed, Processor

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM


class Collated:
    """A batch of one data set before the encoders ran.

    Not a dataclass: trainers change the type of every tensor in one for some precisions, and seeds
    and phases must stay as they are.

    Args:
        packed: prompts, media and answers.
        seeds: int64 per example, see `mmdlm.objectives.noise`.
        phase: float64 per example, see `mmdlm.objectives.objective.Batch`.
        groups: per example, for metrics.
        names: per example, token ids of what its media show: int64 [words] for audio, a list of
            such per token for an image; empty where the data do not tell.
        row_tokens: tokens of a row into which conversations are packed; None: one per row.
        extra: padding tokens after the longest row, to which all are extended, see
            `mmdlm.data.form.extended`; None: rows keep their lengths.
        also: token ids that are learnt wherever they occur, as if they were answers.
    """

    def __init__(
        self,
        packed: Packed,
        seeds: Tensor,
        phase: Tensor,
        groups: tuple[str, ...],
        names: Items[Tensor | list[Tensor]] = (),
        row_tokens: int | None = None,
        extra: int | None = None,
        also: tuple[int, ...] = (),
    ) -> None:
        self.packed, self.seeds, self.phase, self.groups = packed, seeds, phase, groups
        self.names, self.row_tokens = list(names), row_tokens
        self.extra, self.also = extra, also


def collate(
    processor: Processor,
    examples: Items[Example],
    seeds: Tensor,
    phase: Tensor,
    row_tokens: int | None = None,
    extra: int | None = None,
    also: tuple[int, ...] = (),
) -> Collated:
    """One batch of examples; needs no weights, so worker processes can make it.

    Args:
        processor: of the model.
        examples: at least one.
        seeds: see `Collated`.
        phase: see `Collated`.
        row_tokens: see `Collated`.
        extra: see `Collated`.
        also: see `Collated`.

    Raises:
        ValueError: only some of the examples name what their media show, an answer does not fit
            its canvas, or an example is not valid.
    """
    names = [_names(processor, one.names) for one in examples if one.names is not None]
    if names and len(names) != len(examples):
        raise ValueError(
            f"{len(names)} of {len(examples)} examples name their media; all or none must"
        )
    groups = tuple(one.group for one in examples)
    packed = processor.pack(examples)
    return Collated(packed, seeds, phase, groups, names, row_tokens, extra, also)


def _names(processor: Processor, names: Any) -> Tensor | list[Tensor]:
    if names and isinstance(names[0], tuple):
        return [_names(processor, words) for words in names]
    return torch.tensor([processor.tokenizer.id(word) for word in names], dtype=torch.long)


def batch(model: MultimodalDLM, collated: Collated) -> Batch:
    """The batch an objective takes, with its media encoded.

    Args:
        model: on the device where it is trained.
        collated: its rows get seeds and phases of their own where one example gave several.
    """
    packed = collated.packed
    held: dict[Any, Tensor] = {}
    sequence = model.embed(packed.rows, held)
    if collated.extra is not None:
        rows = [row.map(lambda item: held[item.digest]) for row in packed.rows]
        sequence = model.arrange(extended(rows, collated.extra, model.spec.pad_id))
    if collated.also:
        sequence = _learnt(sequence, collated.also, model.spec.attention)
    media: dict[str, list[Tensor]] = {}
    for row, branch in zip(packed.rows, packed.branch, strict=True):
        for item in row.items if branch == 0 else ():
            media.setdefault(item.kind, []).append(held[item.digest])
    place, turn = torch.tensor(packed.example), torch.tensor(packed.branch)
    # A branch's own seed, and the phase it would have inside a shared row.
    seeds, phase = collated.seeds[place] + (turn << 40), collated.phase[place] + GOLDEN * turn
    packing = None
    if collated.row_tokens is not None:
        sequence, packing = together(model, packed.rows, sequence, held, collated.row_tokens)
    seeds, phase = seeds.to(model.device), (phase % 1).to(model.device)
    return Batch(sequence, seeds, phase, collated.groups, media, collated.names, packing)


def _learnt(sequence: Sequence, ids: tuple[int, ...], attention: str) -> Sequence:
    """The sequence, whose tokens with these ids count as tokens of an answer."""
    if attention != "full":
        raise ValueError(f"also needs a model with full attention, not {attention}; leave it out")
    found = torch.isin(sequence.tokens, torch.tensor(ids, device=sequence.tokens.device))
    found &= sequence.mask & (sequence.source == TOKEN)
    return replace(sequence, role=sequence.role.masked_fill(found, ANSWER))


def together(
    model: MultimodalDLM,
    rows: Items[Row],
    apart: Sequence,
    held: dict[Any, Tensor],
    row_tokens: int,
) -> tuple[Sequence, Packing]:
    """Rows packed into fewer ones; rows with several turns about shared media stay alone.

    Every conversation becomes a turn: it has positions from 0, and attends to itself only.

    Args:
        model: it lays the rows out.
        rows: one conversation each.
        apart: their layout.
        held: embeddings of all media, by digest.
        row_tokens: tokens of a packed row; a longer conversation has a row alone.
    """
    rows = [row.map(lambda item: held[item.digest]) for row in rows]
    sizes = [row.length for row in rows]
    single = [i for i, row in enumerate(rows) if len(row.turns) == 1]
    chosen = [[single[i] for i in own] for own in bins([sizes[i] for i in single], row_tokens)]
    chosen += [[i] for i in range(len(rows)) if len(rows[i].turns) != 1]
    merged = [rows[own[0]] if len(own) == 1 else _merged([rows[i] for i in own]) for own in chosen]
    sequence = model.arrange(merged)
    width = apart.mask.shape[1]
    place = torch.full(sequence.mask.shape, -1)
    for number, own in enumerate(chosen):
        # Padding is on the left.
        found = [torch.arange((i + 1) * width - sizes[i], (i + 1) * width) for i in own]
        joined = torch.cat(found)
        place[number, place.shape[1] - len(joined) :] = joined
    return sequence, Packing(replace(apart, media=None), place.to(apart.mask.device))


def _merged(rows: Items[Row]) -> Row:
    """One row whose turns are the conversations of several, which have one turn each."""
    return Row((), tuple(Turn((*r.parts, *r.turns[0].parts), r.turns[0].answer) for r in rows))
