"""Weights of the masked tokens in the loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mmdlm.layout import Sequence
    from mmdlm.objectives.noise import Noise

Weight = Literal["1/t", "one", "linear", "schedule", "cart", "cart_shifted", "path"]
"""Weight w of a masked token's cross entropy; p is its mask probability.

- "1/t": 1 / p. LLaDA, LLaDA-V, d1, DIFFA, MMaDA, SMDM, SDAR.
- "one": 1. LaViDa, dParallel, MMaDA's image tokens.
- "linear": 1 - p. An option of Dream (DreamLM/Dream-VLX).
- "schedule": p'(t) / p(t). MDLM, BD3-LM, dllm (ZHZisZZ/dllm); see `Schedule`.
- "cart": context-adaptive, sum over visible tokens j of p_c (1 - p_c)^(|n - j| - 1) / 2. Dream;
  p_c is 0.1 in its configs and in NAP's, 0.3 in dllm.
- "cart_shifted": the same as DreamLM/Dream-VLX computes it on the shifted mask, where the first
  token is not context and one visible token follows the last.
- "path": 1 + q / p, q the probability given to the right token, without gradient.
  pengzhangzhi/Open-dLLM.
"""

NEGLIGIBLE = 1e-6
"""Context that is so far away that it adds less than this share is left out."""


def weights(kind: Weight, noise: Noise, sequence: Sequence, cart_p: float, guard: float) -> Tensor:
    """[B L] weights that do not depend on the losses; for "path", 1 / p.

    Args:
        kind: see `Weight`.
        noise: of the batch.
        sequence: layout of the batch.
        cart_p: p_c of "cart" and "cart_shifted".
        guard: added to p for "schedule".
    """
    p = noise.p
    if kind == "one":
        return torch.ones_like(p)
    if kind == "linear":
        return 1 - p
    if kind == "schedule":
        return noise.slope / (p + guard)
    if kind.startswith("cart"):
        context = noise.real & ~noise.hidden
        return cart(context, sequence, cart_p, is_shifted=kind == "cart_shifted").to(p.dtype)
    return 1 / p


def cart(context: Tensor, sequence: Sequence, p: float, *, is_shifted: bool = False) -> Tensor:
    """Dream's context-adaptive weights, float32 [B L].

    w_n = sum over context tokens j != n of p (1 - p)^(|n - j| - 1) / 2, distances by position in
    the dialogue turn. It is a convolution over the nearest tokens, not an [L L] table: with
    p = 0.1, 131 to each side.

    Args:
        context: [B L] bool, tokens that the model sees.
        sequence: layout; turns are not context of each other.
        p: of the geometric distribution, in (0, 1].
        is_shifted: see "cart_shifted".
    """
    positions, branch = sequence.positions, sequence.branch
    length = int(positions.max()) + 2
    reach = length - 1
    if p < 1:
        reach = min(reach, max(1, math.ceil(math.log(NEGLIGIBLE) / math.log(1 - p))))
    distance = torch.arange(-reach, reach + 1, device=context.device).abs().float()
    kernel = 0.5 * p * (1 - p) ** (distance - 1).clamp(min=0)
    kernel[reach] = 0
    found = torch.zeros(context.shape, device=context.device)
    turns = [None] if branch is None else range(1, int(branch.max()) + 1)
    for turn in turns:
        own = sequence.mask if turn is None else sequence.mask & (branch == turn)
        seen = context if turn is None else context & ((branch == turn) | (branch == 0))
        line = torch.zeros(len(context), length, device=context.device)
        line.scatter_reduce_(1, positions, seen.float(), "amax")
        if is_shifted:
            line[:, 0] = 0
            last = positions.masked_fill(~own, -1).amax(1, keepdim=True)
            line.scatter_(1, last + 1, 1.0)
        weight = F.conv1d(line[:, None], kernel[None, None], padding=reach)[:, 0]
        found = torch.where(own, weight.gather(1, positions), found)
    return found
