"""What all masked objectives and their wrappers have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmdlm.layout import ANSWER, TOKEN
from mmdlm.objectives.objective import Batch, Losses, Objective

if TYPE_CHECKING:
    from mmdlm.layout import Sequence
    from mmdlm.model import MultimodalDLM
    from mmdlm.objectives.noise import Noise


class Denoising:
    """A step in three parts, so that objectives can be wrapped: prepare, corrupt, loss."""

    def prepare(self, model: MultimodalDLM, batch: Batch) -> Batch:
        """The batch, without what is not trained on."""
        return batch

    def corrupt(self, batch: Batch) -> Noise:
        """Random noise for a batch."""
        raise TypeError(f"{type(self).__name__} does not define corrupt(batch)")

    def loss(self, model: MultimodalDLM, batch: Batch, noise: Noise) -> Losses:
        """The loss of a batch with given noise."""
        raise TypeError(f"{type(self).__name__} does not define loss(model, batch, noise)")

    def step(self, model: MultimodalDLM, batch: Batch) -> Losses:
        """The loss of a batch with random noise."""
        batch = self.prepare(model, batch)
        return self.loss(model, batch, drawn(self, batch))


class Wrapping(Denoising):
    """Changes the loss of another objective; `objective` is the other one."""

    objective: Objective

    def check_objective(self) -> None:
        """Raises TypeError if the other objective does not mask tokens."""
        if not isinstance(self.objective, Denoising):
            raise TypeError(
                f"{type(self).__name__}.objective is {type(self.objective).__name__}, which does "
                "not mask tokens; use mmdlm.objectives.masked.Masked"
            )

    def prepare(self, model: MultimodalDLM, batch: Batch) -> Batch:
        """As the other objective does."""
        return self.objective.prepare(model, batch)

    def corrupt(self, batch: Batch) -> Noise:
        """The noise of the other objective."""
        return self.objective.corrupt(batch)


def drawn(objective: Denoising, batch: Batch) -> Noise:
    """The noise of a batch; that of a packed one is drawn for each conversation alone."""
    if batch.packing is None:
        return objective.corrupt(batch)
    return batch.packing.join(objective.corrupt(batch.apart))


def noisy(model: MultimodalDLM, sequence: Sequence, noise: Noise) -> Sequence:
    """The sequence with the mask token at masked positions.

    Raises:
        ValueError: the mask id of the model is unknown, or it has none.
    """
    model.spec.require_masks("training by masks")
    return sequence.with_tokens(sequence.tokens.masked_fill(noise.hidden, model.spec.mask_id))


def scored(model: MultimodalDLM, sequence: Sequence, noise: Noise) -> Tensor:
    """[B L] bool, masked tokens that the model predicts.

    A model with `shift` predicts a token from the position before it, so not the first of a row.
    """
    return noise.masked & (sequence.positions > 0) if model.spec.shift else noise.masked


def without_repeated_ends(sequence: Sequence, eos: int | None) -> Sequence:
    """The sequence in which end tokens after an answer's first are padding.

    Args:
        sequence: answers may end in several end tokens.
        eos: end token.
    """
    end = sequence.is_answer & (sequence.tokens == (-1 if eos is None else eos))
    repeated = end & torch.cat([torch.zeros_like(end[:, :1]), end[:, :-1]], 1)
    if sequence.branch is not None:  # the first token of a turn follows another turn
        repeated[:, 1:] &= sequence.branch[:, 1:] == sequence.branch[:, :-1]
    return replace(sequence, mask=sequence.mask & ~repeated)


def with_whole_blocks(sequence: Sequence, eos: int, size: int) -> Sequence:
    """The sequence in which end tokens fill the block of an answer's first end token, and no more.

    Args:
        sequence: rows that end with their answer, with block-causal levels.
        eos: end token.
        size: tokens per block.
    """
    more = torch.arange(1, size + 1, device=sequence.tokens.device).expand(len(sequence.tokens), -1)
    positions = sequence.positions[:, -1:] + more
    added = {
        "tokens": torch.full_like(more, eos),
        "role": torch.full_like(more, ANSWER),
        "source": torch.full_like(more, TOKEN),
        "mask": sequence.is_answer[:, -1:].expand_as(more),
        "positions": positions,
        "level": positions // size,
    }
    longer = {name: torch.cat([getattr(sequence, name), x], 1) for name, x in added.items()}
    whole = replace(sequence, **longer)
    end = whole.is_answer & (whole.tokens == eos)
    repeated = end & torch.cat([torch.zeros_like(end[:, :1]), end[:, :-1]], 1)
    first = whole.level.masked_fill(~end | repeated, -1).cummax(1).values  # block of the first one
    return replace(whole, mask=whole.mask & ~(repeated & (whole.level > first)))
