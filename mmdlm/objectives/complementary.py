"""Complementary masks: every answer token is masked in one of two copies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from encoders.checks import Checked
from mmdlm.layout import chosen
from mmdlm.objectives.denoising import Wrapping
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.noise import Noise
from mmdlm.objectives.objective import Batch, Losses, Objective

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class Complementary(Checked, Wrapping, Objective):
    """Another masked objective on two copies of the batch with complementary masks.

    Masks m and not m partition the answer, so one step scores every answer token once. Media are
    encoded once, the copies are made after that. The second copy has mask probability 1 - p. The
    default is LaViDa's loss, the plain mean over the masked tokens of both copies, without the 1/t
    of its paper (jacklishufan/LaViDa: llava/model/language_model/llava_llada.py).

    Args:
        objective: a masked objective.
    """

    objective: Objective = Masked(weight="one", normaliser="masked")

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        self.check_objective()

    def loss(self, model: MultimodalDLM, batch: Batch, noise: Noise) -> Losses:
        """The loss of both copies."""
        rows = torch.arange(len(noise.masked), device=noise.masked.device)
        both = chosen(batch.sequence, rows.repeat(2))
        noise = noise.joined(noise.complement())
        return self.objective.loss(model, replace(batch, sequence=both), noise)
