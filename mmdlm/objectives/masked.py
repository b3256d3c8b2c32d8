"""Masked diffusion: predict the masked tokens of the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor

from encoders.checks import AtLeast, Below, Checked, PositiveInt, UnitFloat
from mmdlm.layout import GOLDEN
from mmdlm.objectives.cross_entropy import cross_entropy
from mmdlm.objectives.noise import uniform
from mmdlm.objectives.objective import Batch, Losses, Objective

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class Masked(Checked, Objective):
    """Cross entropy of masked answer tokens, with a random noise level per dialogue turn.

    With level t every answer token is masked with probability p = (1 - eps) t + eps, and
    loss = sum over masked of w CE / Z. The defaults, w = 1/p and Z = answer tokens of a batch, are
    the bound LLaDA trains on (ML-GSAI/LLaDA: GUIDELINES.md; one divisor for the batch as in
    dllm-reasoning/d1 and ZHZisZZ/dllm). weight "one" with normaliser "masked" is the plain mean of
    LaViDa (jacklishufan/LaViDa). Prompt, media and padding are never masked or scored; end tokens
    inside the answer's canvas are. Levels are antithetic over the global batch.

    Args:
        weight: w, "1/t" or "one".
        normaliser: Z, "answer" (all answer tokens) or "masked" (those that were masked).
        eps: lowest mask probability.
        full: share of turns whose whole answer is masked, as at the start of decoding (the
            full_mask_ratio of DreamLM/Dream-VLX: vla/vla-scripts/finetune_dream.py); with "1/t"
            w is 1 for these.
        chunk: positions whose logits exist at a time, see `mmdlm.objectives.cross_entropy`.
    """

    weight: Literal["1/t", "one"] = "1/t"
    normaliser: Literal["answer", "masked"] = "answer"
    eps: Annotated[float, AtLeast(0), Below(1)] = 1e-3
    full: UnitFloat = 0.0
    chunk: PositiveInt = 2048

    def corrupt(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which tokens are masked, bool [B L], and their mask probability, float32 [B L]."""
        sequence = batch.sequence
        answer = sequence.is_answer
        answer &= sequence.mask
        branch = torch.ones_like(sequence.role) if sequence.branch is None else sequence.branch
        turns = int(branch.max()) + 1
        turn = torch.arange(turns, device=branch.device)
        level = batch.phase[:, None] + GOLDEN * turn  # [B turns]
        p = (1 - self.eps) * (level % 1) + self.eps  # [B turns]
        whole = uniform(batch.seeds, turns, stream=2) < self.full
        p = torch.where(whole, torch.ones_like(p), p).gather(1, branch)  # [B L]
        # Counted from the right, so that padding on the left does not change a draw.
        noise = uniform(batch.seeds, answer.shape[1], stream=3).flip(1)
        return answer & (noise < p), p.float()

    def step(self, model: MultimodalDLM, batch: Batch) -> Losses:
        """Loss with one random mask per turn."""
        masked, p = self.corrupt(batch)
        clean = batch.sequence.tokens
        if model.spec.mask_id is None:
            raise model.spec.unknown_mask()
        noisy = batch.sequence.with_tokens(clean.masked_fill(masked, model.spec.mask_id))
        losses, right = cross_entropy(model, noisy, masked, clean[masked], self.chunk)
        answer = batch.sequence.is_answer
        total, count = self.reduce(losses, p[masked], answer.sum())
        ones = torch.ones_like(losses)
        hard = (p[masked] > 0.9).float()
        logs = {
            "ce": (losses.detach().sum(), ones.sum()),
            "accuracy": (right.sum(), ones.sum()),
            "accuracy_t>0.9": ((right * hard).sum(), hard.sum()),
        }
        return Losses(total, count, logs)

    def reduce(self, losses: Tensor, p: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and count of the loss.

        Args:
            losses: [N] cross entropy of the masked tokens.
            p: [N] their mask probability.
            answers: scalar, answer tokens of the batch.
        Returns:
            two float scalars.
        """
        total = losses.sum() if self.weight == "one" else (losses / p).sum()
        count = answers if self.normaliser == "answer" else losses.new_tensor(len(losses))
        return total, count.float()
