"""Tokens of an answer that are given: neither masked nor learnt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from encoders.checks import Checked
from mmdlm.objectives.denoising import Wrapping
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.noise import Noise
from mmdlm.objectives.objective import Batch, Losses, Objective

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class Given(Checked, Wrapping, Objective):
    """Another masked objective in which some ids of an answer are known and not scored.

    For LaViDa's text infilling these are the ends of gaps, which `mmdlm.data.gaps.Gaps` writes
    (jacklishufan/LaViDa: llava/model/language_model/llava_llada.py). A row in which no other token
    was drawn has no loss in this step.

    Args:
        objective: a masked objective.
        ids: the token ids.
    """

    objective: Objective = Masked(weight="one", normaliser="masked")
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        self.check_objective()

    def corrupt(self, batch: Batch) -> Noise:
        """The noise of the other objective, without these tokens."""
        noise, tokens = self.objective.corrupt(batch), batch.sequence.tokens
        learnt = ~torch.isin(tokens, torch.tensor(self.ids, device=tokens.device))
        return replace(noise, masked=noise.masked & learnt, maskable=noise.maskable & learnt)

    def loss(self, model: MultimodalDLM, batch: Batch, noise: Noise) -> Losses:
        """The loss of the other objective."""
        return self.objective.loss(model, batch, noise)
