"""Masked diffusion: predict the masked tokens of the answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor

from encoders.checks import Above, AtLeast, AtMost, Below, Checked, PositiveInt, UnitFloat
from mmdlm.objectives.cross_entropy import Scores, cross_entropy, weighted_cross_entropy
from mmdlm.objectives.denoising import (
    Denoising,
    noisy,
    scored,
    with_whole_blocks,
    without_repeated_ends,
)
from mmdlm.objectives.draw import Draw
from mmdlm.objectives.logits import measured
from mmdlm.objectives.noise import Noise
from mmdlm.objectives.normaliser import Normaliser, normalised
from mmdlm.objectives.objective import Batch, Losses, Objective
from mmdlm.objectives.schedule import Schedule
from mmdlm.objectives.weights import Weight, weights

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM

BINS = 10
"""Ranges of the mask probability in which the cross entropy is logged."""


@dataclass(frozen=True)
class Masked(Checked, Denoising, Objective):
    """Cross entropy of masked answer tokens, with a random noise level per dialogue turn.

    With level t every answer token is masked with probability p(t), t from eps to 1, and
    loss = sum over masked of w CE / Z. The defaults, p = t, w = 1/p and Z = answer tokens of a
    batch, are the bound LLaDA trains on (ML-GSAI/LLaDA: GUIDELINES.md; one divisor for the batch as
    in dllm-reasoning/d1 and ZHZisZZ/dllm). weight "one" with normaliser "masked" is the plain mean
    of LaViDa (jacklishufan/LaViDa). Prompt, media and padding are never masked or scored; end
    tokens inside the answer's canvas are. Whether position i predicts token i or i + 1 is a
    property of the model (`shift`). `configs/objectives` has the settings of published systems.

    Args:
        weight: w, see `mmdlm.objectives.weights.Weight`.
        normaliser: Z, see `mmdlm.objectives.normaliser.Normaliser`.
        eps: lowest noise level.
        full: share of turns whose whole answer is masked, as at the start of decoding (the
            full_mask_ratio of DreamLM/Dream-VLX: vla/vla-scripts/finetune_dream.py); with "1/t"
            w is 1 for these.
        chunk: positions whose logits exist at a time, see `mmdlm.objectives.cross_entropy`.
        draw: how levels and masks are drawn.
        schedule: mask probability of a level.
        ends: end tokens that fill an answer's canvas. "all": maskable, so that the model learns
            the length (LLaDA, LLaDA-V, LaViDa, DIFFA, d1, dParallel). "first": those after the
            first are padding (SDAR, Open-dLLM). "block": as "first", but end tokens fill the block
            of the first one, for block-causal models (DiffusionVL's `bd3lm_block_aligned_eos`).
        cart_p: p of the weight "cart".
        exclude_mask: probability is shared among the tokens other than the mask, as in MDLM (its
            SUBS parameterization); LLaDA's code includes the mask.
    """

    weight: Weight = "1/t"
    normaliser: Normaliser = "answer"
    eps: Annotated[float, AtLeast(0), Below(1)] = 1e-3
    full: UnitFloat = 0.0
    chunk: PositiveInt = 512
    draw: Draw = Draw()
    schedule: Schedule = Schedule()
    ends: Literal["all", "first", "block"] = "all"
    cart_p: Annotated[float, Above(0), AtMost(1)] = 0.1
    exclude_mask: bool = False

    @property
    def is_bound(self) -> bool:
        """Whether levels are uniform, so that slope / p is the weight of the likelihood's bound."""
        draw = self.draw
        is_uniform = draw.level == "uniform" and draw.clip is None and self.full == 0
        is_drawn = draw.count in ("bernoulli", "exact") and not draw.at_least_one and not draw.whole
        return is_uniform and is_drawn

    def prepare(self, model: MultimodalDLM, batch: Batch) -> Batch:
        """The batch with the end tokens that `ends` asks for.

        Raises:
            ValueError: `ends` is "block", and the model has no blocks or the turns of a row share
                their media.
        """
        sequence, spec = batch.sequence, model.spec
        if self.ends == "all":
            return batch
        if self.ends == "first":
            sequence = without_repeated_ends(sequence, spec.eos_id)
        elif spec.attention == "block_causal" and sequence.branch is None:
            sequence = with_whole_blocks(sequence, spec.eos_id, spec.block_size)
        else:
            raise ValueError(
                f"Masked.ends is 'block', which needs a model with block_causal attention, not "
                f"{spec.attention}; use 'all' or 'first'"
            )
        return replace(batch, sequence=sequence)

    def corrupt(self, batch: Batch) -> Noise:
        """Random noise for a batch."""
        return self.draw(batch, self.schedule, self.eps, self.full)

    def loss(self, model: MultimodalDLM, batch: Batch, noise: Noise) -> Losses:
        """The loss of a batch with given noise; a zero with a gradient graph if none is masked."""
        sequence = batch.sequence
        at = scored(model, sequence, noise)
        w = weights(self.weight, noise, sequence, self.cart_p, self.schedule.guard)[at]
        share, count = normalised(self.normaliser, noise, at)
        if self.exclude_mask or self.weight == "path":
            losses, right = self.scores(model, batch, noise, at)
            if self.weight == "path":
                w = 1 + w * (-losses.detach()).exp()
            total = (w * share * losses).sum()
        else:
            given, clean = noisy(model, sequence, noise), sequence.tokens[at]
            total, (losses, right) = weighted_cross_entropy(
                model, given, at, clean, w * share, self.chunk
            )
        return Losses(total, count, self.logs(losses.detach(), right, noise, at))

    def scores(self, model: MultimodalDLM, batch: Batch, noise: Noise, at: Tensor) -> Scores:
        """Cross entropy of the tokens at some positions of the noisy sequence.

        Args:
            model: the model that scores.
            batch: with the clean sequence.
            noise: of the batch.
            at: [B L] bool.
        """
        clean, given = batch.sequence.tokens[at], noisy(model, batch.sequence, noise)
        if not self.exclude_mask:
            return cross_entropy(model, given, at, clean, self.chunk)

        def score(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
            mask = torch.full_like(target[:, None], model.spec.mask_id)
            logits = logits.scatter(1, mask, -torch.inf)
            losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
            return losses, (logits.detach().argmax(-1) == target).float()

        return Scores(*measured(model, given, at, self.chunk, score, clean))

    def logs(
        self, losses: Tensor, right: Tensor, noise: Noise, at: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Sum and count of each metric.

        ce: cross entropy of masked tokens. ce_p0.0 to ce_p0.9: of those with a mask probability
        from there to 0.1 more, which vary much less than the loss. nll: the bound of the negative
        log likelihood per maskable token, whatever the weights of the loss.
        """
        p = noise.p[at]
        ones, hard = torch.ones_like(losses), (p > 0.9).float()
        found = {
            "ce": (losses.sum(), ones.sum()),
            "accuracy": (right.sum(), ones.sum()),
            "accuracy_t>0.9": ((right * hard).sum(), hard.sum()),
        }
        if self.is_bound:
            elbo = noise.slope[at] / p * losses
            found["nll"] = (elbo.sum(), noise.maskable.sum().float())
        part = (p * BINS).long().clamp(0, BINS - 1)
        zeros = losses.new_zeros(BINS)
        sums, counts = zeros.index_add(0, part, losses), zeros.index_add(0, part, ones)
        for i in range(BINS):
            found[f"ce_p{i / BINS:.1f}"] = (sums[i], counts[i])
        return found
