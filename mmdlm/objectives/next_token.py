"""Next-token prediction: the autoregressive counterpart of the masked objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from encoders.checks import Checked, PositiveInt
from mmdlm.objectives.cross_entropy import weighted_cross_entropy
from mmdlm.objectives.objective import Batch, Losses, Objective

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class NextToken(Checked, Objective):
    """Mean cross entropy of every answer token given the ones before it.

    For models with a causal answer (block_size 1) whose position i predicts token i + 1 (shift).
    It trains the autoregressive twin that a masked model is compared with.

    Args:
        chunk: positions whose logits exist at a time, see `mmdlm.objectives.cross_entropy`.
    """

    chunk: PositiveInt = 512

    def step(self, model: MultimodalDLM, batch: Batch) -> Losses:
        """Loss of all answer tokens.

        Raises:
            ValueError: the model attends to the tokens it has to predict.
        """
        if model.spec.block_size != 1 or not model.spec.shift:
            raise ValueError(
                f"NextToken needs block_size 1 and shift, the model has block_size "
                f"{model.spec.block_size} and shift {model.spec.shift}; use Masked"
            )
        sequence = batch.sequence
        answer = sequence.is_answer & (sequence.positions > 0)  # nothing predicts a row's first
        target = sequence.tokens[answer]
        total, (losses, right) = weighted_cross_entropy(
            model, sequence, answer, target, 1.0, self.chunk
        )
        count = torch.ones_like(losses).sum()
        logs = {"ce": (losses.sum(), count), "accuracy": (right.sum(), count)}
        return Losses(total, count, logs)
