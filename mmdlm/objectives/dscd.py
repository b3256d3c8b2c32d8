"""Discrete-space consistency distillation (CD4LM): agree with a less noisy view."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.checks import Checked, PositiveFloat, PositiveInt, UnitFloat
from mmdlm.objectives.denoising import noisy, scored
from mmdlm.objectives.draw import ranks, turns
from mmdlm.objectives.logits import measured
from mmdlm.objectives.noise import Noise, uniform, uniform_at
from mmdlm.objectives.objective import Batch, Losses, Objective

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class DSCD(Checked, Objective):
    """KL divergence from a view with fewer masks, and cross entropy.

    The student sees a share r of the answer masked, r uniform in [0.4, 0.9]. The teacher sees a
    subset of these masks, r x U(0.3, 0.7), within [0.1, 0.6]. Over the N tokens that the student
    has to predict, loss = share T^2 KL(teacher || student) / N + (1 - share) CE / N. The teacher is
    the model itself without gradient. Source: CD4LM, src/training/consistency_loss.py, which lets
    the share fall from 0.9 to 0.5 during training (here it is fixed) and clamps both terms to 5,
    where their gradient ends.

    Args:
        share: of the divergence in the loss, lambda in the source.
        temperature: T, of both distributions.
        clamp: largest mean of each term, 5 in the source; None: no limit.
        chunk: positions whose logits exist at a time.
    """

    STUDENT: ClassVar[tuple[float, float]] = (0.4, 0.9)
    TEACHER: ClassVar[tuple[float, float]] = (0.3, 0.7)

    share: UnitFloat = 0.7
    temperature: PositiveFloat = 2.0
    clamp: PositiveFloat | None = None
    chunk: PositiveInt = 2048

    def corrupt(self, batch: Batch) -> tuple[Noise, Tensor]:
        """Noise of the student, and the teacher's masks [B L], a subset of the student's."""
        sequence = batch.sequence
        maskable = sequence.is_answer
        turn = turns(sequence)
        order = uniform(batch.seeds, turn.shape[1], stream=3).flip(1)
        rank, size = ranks(order, turn, maskable)
        u, v = (uniform_at(batch.seeds, turn, stream) for stream in (6, 7))
        (low, high), (least, most) = self.STUDENT, self.TEACHER
        r = low + (high - low) * u
        r = torch.where(size < 20, r.clamp(max=0.5), r)
        student = torch.maximum((size * r).floor(), (size * 0.1).ceil()).clamp(min=2)
        teacher = (size * (r * (least + (most - least) * v)).clamp(0.1, 0.6)).floor().clamp(min=1)
        student = torch.where(size <= 10, 2.0, student)
        teacher = torch.where(size <= 10, 1.0, teacher)
        masked = maskable & (rank < student)
        p = (student.minimum(size) / size.clamp(min=1)).float()
        noise = Noise(masked, maskable, sequence.mask, p, torch.ones_like(p))
        return noise, masked & (rank < teacher)

    def step(self, model: MultimodalDLM, batch: Batch) -> Losses:
        """The loss with random masks."""
        if batch.packing is None:
            return self.loss(model, batch, *self.corrupt(batch))
        noise, teacher = self.corrupt(batch.apart)
        joined = batch.packing.join(replace(noise, covered=teacher))
        return self.loss(model, batch, replace(joined, covered=None), joined.covered)

    def loss(self, model: MultimodalDLM, batch: Batch, noise: Noise, teacher: Tensor) -> Losses:
        """The loss with given masks.

        Args:
            model: student and teacher.
            batch: with clean answers.
            noise: of the student.
            teacher: [B L] bool, masks of the teacher, a subset of the student's.
        """
        sequence = batch.sequence
        at = scored(model, sequence, noise)
        given = noisy(model, sequence, noise)
        clearer = sequence.tokens.masked_fill(teacher, model.spec.mask_id)
        with torch.no_grad():
            hidden = model.hidden_at(sequence.with_tokens(clearer), at)

        def measure(logits: Tensor, target: Tensor, known: Tensor) -> tuple[Tensor, ...]:
            losses = F.cross_entropy(logits, target, reduction="none")
            with torch.no_grad():
                aim = (model.backbone.head(known).float() / self.temperature).log_softmax(-1)
            log = (logits / self.temperature).log_softmax(-1)
            divergence = F.kl_div(log, aim, reduction="none", log_target=True).sum(-1)
            right = (logits.detach().argmax(-1) == target).float()
            return losses, divergence * self.temperature**2, right

        clean = sequence.tokens[at]
        losses, far, right = measured(model, given, at, self.chunk, measure, clean, hidden)
        count = torch.ones_like(right).sum()
        logs = {
            "ce": (losses.detach().sum(), count),
            "accuracy": (right.sum(), count),
            "divergence": (far.detach().sum(), count),
        }
        total = self.share * self.limited(far, count)
        return Losses(total + (1 - self.share) * self.limited(losses, count), count, logs)

    def limited(self, values: Tensor, count: Tensor) -> Tensor:
        """Sum of values whose mean is at most `clamp`."""
        return values.sum() if self.clamp is None else values.sum().clamp(max=self.clamp * count)
