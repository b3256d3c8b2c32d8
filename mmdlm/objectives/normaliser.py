"""Normalisers: what the weighted sum of the losses is divided by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmdlm.objectives.noise import Noise

Normaliser = Literal["answer", "masked", "row", "length", "rows"]
"""Divisor Z. All are counted over the global batch.

- "answer": maskable tokens. d1, DIFFA, SMDM, SDAR; "token" in ZHZisZZ/dllm.
- "masked": masked tokens. Dream, LaViDa, Open-dLLM, MMaDA's image tokens. With 1/p it is not a
  bound of the likelihood: p counts twice.
- "row": maskable tokens of each row, all its turns together, then the mean over rows. LLaDA's SFT,
  LLaDA-V, MMaDA; "sequence" in dllm. In a packed batch, of each conversation.
- "length": all tokens but padding, prompt and media included. LLaDA's pretraining, MDLM.
- "rows": rows. "batch" in dllm.
"""


def normalised(kind: Normaliser, noise: Noise, at: Tensor) -> tuple[Tensor, Tensor]:
    """Factor of each weighted loss before the sum, and what the sum is divided by.

    Args:
        kind: see `Normaliser`.
        noise: of the batch.
        at: [B L] bool, the N tokens with a loss.
    Returns:
        float32 [N], or a scalar for all; and a float32 scalar.
    """
    share = torch.ones((), device=at.device)
    if kind == "row":
        row = at.nonzero()[:, 0] if noise.row is None else noise.row[at]
        share = 1 / noise.per_row(noise.maskable.long()).clamp(min=1)[row]
    count = {
        "answer": noise.maskable.sum,
        "masked": at.sum,
        "row": lambda: (noise.per_row(noise.real.long()) > 0).sum(),
        "length": noise.real.sum,
        "rows": lambda: (noise.per_row(noise.real.long()) > 0).sum(),
    }[kind]()
    return share, count.float()
