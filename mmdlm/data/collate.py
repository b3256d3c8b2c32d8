"""Examples of a data set as one batch of a model."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdlm.messages import Example
from mmdlm.objectives.draw import GOLDEN
from mmdlm.objectives.objective import Batch
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
    """

    def __init__(
        self,
        packed: Packed,
        seeds: Tensor,
        phase: Tensor,
        groups: tuple[str, ...],
        names: Items[Tensor | list[Tensor]] = (),
    ) -> None:
        self.packed, self.seeds, self.phase, self.groups = packed, seeds, phase, groups
        self.names = list(names)


def collate(
    processor: Processor, examples: Items[Example], seeds: Tensor, phase: Tensor
) -> Collated:
    """One batch of examples; needs no weights, so worker processes can make it.

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
    return Collated(processor.pack(examples), seeds, phase, groups, names)


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
    media: dict[str, list[Tensor]] = {}
    for row, branch in zip(packed.rows, packed.branch, strict=True):
        for item in row.items if branch == 0 else ():
            media.setdefault(item.kind, []).append(held[item.digest])
    place, turn = torch.tensor(packed.example), torch.tensor(packed.branch)
    # A branch's own seed, and the phase it would have inside a shared row.
    seeds, phase = collated.seeds[place] + (turn << 40), collated.phase[place] + GOLDEN * turn
    device = model.device
    return Batch(
        sequence, seeds.to(device), (phase % 1).to(device), collated.groups, media, collated.names
    )
