"""Nucleus sampling: top-p, top-k and temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from encoders.checks import Above, AtMost, PositiveFloat, PositiveInt
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Nucleus(Strategy):
    """Nucleus (top-p) and top-k filter: scales the logits and removes improbable tokens.

    With `Gumbel(1.0)` after it this is how Dream samples: its confidences are those of the scaled
    and filtered distribution.

    Source: HKUNLP/Dream: generation_utils.py (top_p_logits, top_k_logits, sample_tokens).

    Args:
        top_p: the most probable tokens stay, up to the one at which their sum reaches this.
        top_k: maximum number of tokens that stay, more where the last is tied; None: no limit.
        temperature: what the logits are divided by first, above 0; for the likeliest token leave
            `Gumbel` out instead.
    """

    paper: ClassVar[str] = "Dream, arXiv 2508.15487"

    top_p: Annotated[float, Above(0), AtMost(1)] = 0.95
    top_k: PositiveInt | None = None
    temperature: PositiveFloat = 1.0

    def guide(self, view: View, logits: Tensor) -> Tensor:
        """[B R V] with -inf for the tokens left out, and for the mask token."""
        # Where the mask token is the likeliest, nothing else would be left.
        logits = view.ban_mask(logits / self.temperature)
        if self.top_p < 1:
            ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
            p = ordered.softmax(-1)
            before = p.cumsum(-1) - p
            out = torch.zeros_like(ordered, dtype=torch.bool).scatter(-1, ids, before > self.top_p)
            logits = logits.masked_fill(out, -torch.inf)
        if self.top_k is not None:
            last = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < last, -torch.inf)
        return logits
