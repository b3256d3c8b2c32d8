"""Examples of a data set as one batch of a model."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.data.form import extended
from mmdlm.layout import ANSWER, PROMPT, TOKEN, Row, Sequence, Turn
from mmdlm.messages import Example, Slot
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
        known: bool per row, answer tokens that are not learnt, see `mmdlm.messages.Slot`; empty if
            all are.
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
        known: Items[Tensor] = (),
        extra: int | None = None,
        also: tuple[int, ...] = (),
    ) -> None:
        self.packed, self.seeds, self.phase, self.groups = packed, seeds, phase, groups
        self.names, self.row_tokens, self.known = list(names), row_tokens, list(known)
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
    known = _known(packed, examples)
    return Collated(packed, seeds, phase, groups, names, row_tokens, known, extra, also)


def _known(packed: Packed, examples: Items[Example]) -> list[Tensor]:
    """Of each row, which tokens of its answers are not learnt; empty if all are."""
    slots = [
        next((part for part in messages[-1].parts if isinstance(part, Slot)), None)
        for one in examples
        for messages in one.conversations
        if messages
    ]
    if all(slot is None or slot.known is None for slot in slots):
        return []
    turns, found = iter(slots), []
    for row in packed.rows:
        parts = []
        for turn, slot in zip(row.turns, turns, strict=False):
            is_given = slot is not None and slot.known is not None
            parts.append(slot.known if is_given else torch.zeros(len(turn.answer)).bool())
        found.append(torch.cat(parts))
    return found


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
    if collated.known or collated.also:
        sequence = _learnt(sequence, collated.known, collated.also, model.spec.attention)
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


def _learnt(
    sequence: Sequence, known: Items[Tensor], also: tuple[int, ...], attention: str
) -> Sequence:
    """The layout in which the tokens to learn, and no others, have the role of an answer.

    Args:
        sequence: [B L].
        known: see `Collated`; these tokens get the role of the prompt, at their level.
        also: see `Collated`.
        attention: of the model.
    Raises:
        ValueError: `also` with attention in which a prompt does not see the answer.
    """
    if also and attention != "full":
        raise ValueError(f"also needs a model with full attention, not {attention}; leave it out")
    role = sequence.role.clone()
    if known:
        sizes = sequence.is_answer.sum(1).tolist()
        each = [F.pad(one, (0, n - len(one))) for one, n in zip(known, sizes, strict=True)]
        is_known = torch.cat(each).to(role.device)
        role[sequence.is_answer] = torch.where(is_known, PROMPT, ANSWER)
    if also:
        found = torch.isin(sequence.tokens, torch.tensor(also, device=sequence.tokens.device))
        role.masked_fill_(found & sequence.mask & (sequence.source == TOKEN), ANSWER)
    return replace(sequence, role=role)


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
    place = place.to(apart.mask.device)
    role = torch.where(place < 0, sequence.role, apart.role.flatten()[place.clamp(min=0)])
    return replace(sequence, role=role), Packing(replace(apart, media=None), place)


def _merged(rows: Items[Row]) -> Row:
    """One row whose turns are the conversations of several, which have one turn each."""
    return Row((), tuple(Turn((*r.parts, *r.turns[0].parts), r.turns[0].answer) for r in rows))
