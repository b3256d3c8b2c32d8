"""Classifier-free guidance by the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from encoders.checks import NonNegativeFloat
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.layout import ANSWER


@dataclass(frozen=True)
class CFG(Strategy):
    """Classifier-free guidance: moves the logits away from those without the text of the prompt.

    A second forward per step, with masks for the text and the media left in place, gives u; the
    logits c become u + (scale + 1) (c - u). Caches hold for both forwards.

    Source: ML-GSAI/LLaDA: generate.py (cfg_scale; there the whole prompt is masked, and both
    forwards count as one because they run as one batch).

    Args:
        scale: strength; 0 is no guidance and costs no second forward.
    """

    paper: ClassVar[str] = "LLaDA, arXiv 2502.09992"
    denies: ClassVar[frozenset[str]] = frozenset({"one_forward"})

    scale: NonNegativeFloat = 1.0

    def guide(self, view: View, logits: Tensor) -> Tensor:
        """[B R V] float32."""
        if self.scale == 0:
            return logits
        text = ~(view.sequence.is_medium | (view.sequence.role == ANSWER))
        without = view.tokens.masked_fill(text, view.model.spec.mask_id)
        plain = view.forward(without, "without text")
        return plain + (self.scale + 1) * (logits - plain)
