"""Classifier-free guidance by the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from encoders.checks import NonNegativeFloat
from mmdlm.decoding.memory import Entry
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.layout import ANSWER


@dataclass(frozen=True)
class CFG(Strategy):
    """Classifier-free guidance: moves the logits away from those without the text of the prompt.

    A second forward per step, with masks for the text and the media left in place, gives u; the
    logits c become u + (scale + 1) (c - u). Caches hold for both forwards.

    Requests with alternative prompts (`mmdlm.decode`) bring the prompts that u is from: "text"
    without the text, "image" without the image. Then c becomes c + sum of scale_i (c - u_i), with
    one forward per term whose scale is not 0.

    Source: ML-GSAI/LLaDA: generate.py (cfg_scale; there the whole prompt is masked, and both
    forwards count as one because they run as one batch).

    Args:
        scale: strength; 0 is no guidance and costs no second forward.
        image: strength by the alternative prompt "image".
    """

    paper: ClassVar[str] = "LLaDA, arXiv 2502.09992"
    denies: ClassVar[frozenset[str]] = frozenset({"one_forward"})

    scale: NonNegativeFloat = 1.0
    image: NonNegativeFloat = 0.0

    def begin(self, view: View) -> dict[str, Entry]:
        """Nothing to remember.

        Raises:
            ValueError: an alternative prompt has another name, or "image" is missing.
        """
        known = {"text", "image"}
        if set(view.alternatives) - known or (self.image and "image" not in view.alternatives):
            raise ValueError(
                f"the request has the alternative prompts {sorted(view.alternatives)}; CFG reads "
                '"text", and "image" if CFG.image is above 0'
            )
        return {}

    def guide(self, view: View, logits: Tensor) -> Tensor:
        """[B R V] float32."""
        if view.alternatives:
            scales = {"text": self.scale, "image": self.image}
            guided = logits
            for name in view.alternatives:
                if scales[name]:
                    guided = guided + scales[name] * (logits - view.alternative(name))
            return guided
        if self.scale == 0:
            return logits
        text = ~(view.sequence.is_medium | (view.sequence.role == ANSWER))
        without = view.tokens.masked_fill(text, view.model.spec.mask_id)
        plain = view.forward(without, "without text")
        return plain + (self.scale + 1) * (logits - plain)
