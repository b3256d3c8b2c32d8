"""ODD: diverse samples within a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.checks import NonNegativeFloat, PositiveInt
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class ODD(Strategy):
    """ODD: diversity guidance, pushes the logits of a row away from those of the rows before it.

    The rows of the batch are samples of one prompt. A row's feature v is the highest probability of
    every token over all its positions (a written token has 1), scaled to length 1. Its direction d
    is the part of v that is orthogonal to the directions of the rows before it (Gram-Schmidt). The
    logits of its masks move along the gradient of quality * w * (v . d), with w the mean
    probability of the best tokens of its masks, scaled so that the longest change of a position is
    alpha (1 - i / steps) in step i of the row. The first row, and a batch of one, stay unchanged.
    This is the only strategy in which rows depend on each other; finished rows have no effect.

    Combine with `Gumbel`: rows of equal prompts differ by their random draws only. Uses all
    positions that a step scores: the whole answer without a cache. Extra memory: three times [R V]
    float32, and [B V].

    Source: ODD (arXiv 2603.04893; sean-lamont/odd: strategies.py, feature_extractor.py and
    generator.py), features pooled by maximum; the gradient is written out here.

    Args:
        alpha: length of the longest change in the first step; 0 changes nothing.
        quality: weight of w; the scaling cancels it, unless it is 0, which changes nothing.
        steps: steps of a row after which nothing changes; None: one per position of the answer.
        protected: ids whose logits are not changed; None: the model's end tokens.
    """

    paper: ClassVar[str] = "ODD, arXiv 2603.04893"
    sees: ClassVar[Literal["answer"]] = "answer"

    alpha: NonNegativeFloat = 16.0
    quality: NonNegativeFloat = 1.0
    steps: PositiveInt | None = None
    protected: tuple[int, ...] | None = None

    def guide(self, view: View, logits: Tensor) -> Tensor:
        """[B R V] float32, changed in place."""
        steps = view.lengths if self.steps is None else self.steps
        alphas = (self.alpha * (1 - view.step.double() / steps)).tolist()
        if max(alphas) <= 0 or self.quality == 0 or len(logits) == 1:
            return logits
        spec, offset = view.model.spec, view.first_id
        columns = range(logits.shape[-1])
        logits = view.ban_mask(logits)
        kept = (spec.eos_id, *spec.stop_ids) if self.protected is None else self.protected
        kept = [token - offset for token in kept if token - offset in columns]
        masks = view.here(view.masked)
        known = view.here(~view.masked)
        tokens = view.tokens.gather(1, view.at) - offset
        basis: list[Tensor] = []
        for i, row in enumerate(logits):
            away, direction = ascent(row, masks[i], known[i], tokens[i], basis)
            basis.append(direction)
            if i > 0 and alphas[i] > 0:
                away[:, kept] = 0.0
                longest = away.norm(dim=-1).max().clamp(min=1e-8)
                row += alphas[i] / longest * away
        return logits


def ascent(
    logits: Tensor, masks: Tensor, known: Tensor, tokens: Tensor, basis: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradient [R V] of w (v . d) by the logits of one row, 0 except at its masks; and d [V].

    See `ODD`; d itself is taken as given. Both are 0 where v lies within the basis.

    Args:
        logits: [R V].
        masks: [R] bool, positions that are masked.
        known: [R] bool, positions that are written; those that are neither are left out.
        tokens: [R] int64, columns of the logits; other numbers have no effect.
        basis: directions [V] of the rows before, orthogonal and of length 1 or 0.
    """
    p = logits.softmax(-1) * masks[:, None]
    highest, at = p.max(0)  # [V]
    inside = known & (tokens >= 0) & (tokens < len(highest))
    written = torch.zeros_like(highest).index_add_(
        0, tokens.where(inside, 0), inside.to(highest.dtype)
    )
    feature = torch.where(written > 0, 1.0, highest)
    length = feature.norm().clamp(min=1e-12)
    v = feature / length
    d = v
    for other in basis:
        d = d - (d @ other) * other
    d = torch.where(d.norm() > 1e-6, F.normalize(d, dim=0), 0.0)
    along = v @ d
    best, top = p.max(-1)  # [R]
    count = masks.sum().clamp(min=1)
    w = best.sum() / count
    # By the probabilities: each token's highest one through v, and each mask's best through w.
    by_feature = torch.where(written > 0, 0.0, w * (d - along * v) / length)
    by_p = torch.zeros_like(p).scatter_(0, at[None], by_feature[None])
    by_p.scatter_add_(1, top[:, None], (along / count * masks)[:, None])
    return p * (by_p - (p * by_p).sum(-1, keepdim=True)), d
