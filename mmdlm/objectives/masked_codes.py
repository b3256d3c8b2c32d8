"""Masked image codes: predict the masked codes of a drawn image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from encoders.checks import AtLeast, Below
from mmdlm.layout import PROMPT
from mmdlm.objectives.draw import Draw
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.normaliser import Normaliser
from mmdlm.objectives.objective import Batch
from mmdlm.objectives.schedule import Schedule
from mmdlm.objectives.weights import Weight

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class MaskedCodes(Masked):
    """Text-to-image loss of MMaDA: the plain mean cross entropy of the masked image codes.

    Of an image's n codes round(n cos(pi u / 2)) are masked, at least 1, with u uniform in [0, 1).
    The ids around and between the codes are given, as they are in decoding. Everything else is as
    in `Masked`, whose other settings apply; the defaults are `configs/objectives/mmada_image`.

    Source: Gen-Verse/MMaDA: models/modeling_mmada.py (forward_process), training/train_mmada.py.
    """

    weight: Weight = "one"
    normaliser: Normaliser = "masked"
    eps: Annotated[float, AtLeast(0), Below(1)] = 0.0
    draw: Draw = Draw(spread="independent", count="rounded")
    schedule: Schedule = Schedule("cosine")

    def prepare(self, model: MultimodalDLM, batch: Batch) -> Batch:
        """The batch, with everything but image codes as part of the prompt.

        Raises:
            ValueError: the model does not draw, or its attention is not full.
        """
        if model.drawing is None:
            raise ValueError("MaskedCodes is for models that draw images; use Masked")
        if model.spec.attention != "full":
            raise ValueError(
                f"MaskedCodes is for full attention, this model has {model.spec.attention}"
            )
        batch = super().prepare(model, batch)
        ids, tokens = model.drawing.ids, batch.sequence.tokens
        other = (tokens < ids.start) | (tokens >= ids.stop)
        sequence = replace(batch.sequence, role=batch.sequence.role.masked_fill(other, PROMPT))
        return replace(batch, sequence=sequence)
