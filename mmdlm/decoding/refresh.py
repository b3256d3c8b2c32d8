"""What the model computes and reads in a step."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmdlm.layout import Sequence


class Refresh(NamedTuple):
    """What one step computes; every batch row has its own positions.

    All tensors but `logits` are [B L] bool on the host.

    Args:
        compute: positions whose keys, values and states are recomputed, at least one per row.
            Position p of a shifted family scores the token at p + 1.
        cached: keep the keys and values for later steps, and attend to those kept earlier. Without
            it `compute` must hold all positions of a row.
        attend: the only keys that may be attended to; None: all that the layout allows.
        prefill: positions computed in a separate forward that only fills the cache, before the
            others; None: there is no such forward. Rows without one take no part in it.
        only: positions that later steps of the block cannot score. A row that has a mask there
            commits it and nothing else; in the other rows `select` decides. None: in all rows.
        logits: [B L V] float32 on the model's device, logits of the latest forward of every
            position; updated in place. All open positions are scored from it, computed or not.
    """

    compute: Tensor
    cached: bool = True
    attend: Tensor | None = None
    prefill: Tensor | None = None
    only: Tensor | None = None
    logits: Tensor | None = None


class Shown(NamedTuple):
    """Answers that the model reads in place of those on the canvas, after every prompt of a row.

    Args:
        tokens: [B G] int64.
        soft: [B G D] expected embeddings of the previous step; None for zeros.
    """

    tokens: Tensor
    soft: Tensor | None = None

    def after(self, sequence: Sequence, prompt: int) -> Sequence:
        """A sequence with these answers.

        Args:
            sequence: prompts [0, prompt) and answers.
            prompt: positions of the prompts.
        """
        soft = self.soft
        if soft is not None:
            soft = torch.cat([soft.new_zeros(len(soft), prompt, soft.shape[2]), soft], 1)
        tokens = torch.cat([sequence.tokens[:, :prompt], self.tokens], 1)
        return replace(sequence, tokens=tokens, soft=soft)
