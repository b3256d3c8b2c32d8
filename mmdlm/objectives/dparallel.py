"""Certainty forcing (dParallel): be right, and be certain where right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.checks import Checked, NonNegativeFloat, PositiveFloat, PositiveInt, UnitFloat
from mmdlm.layout import Sequence, chosen
from mmdlm.objectives.denoising import Denoising, noisy, scored
from mmdlm.objectives.draw import turns
from mmdlm.objectives.logits import measured
from mmdlm.objectives.noise import Noise, uniform, uniform_at
from mmdlm.objectives.objective import Batch, Losses, Objective

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class DParallel(Checked, Denoising, Objective):
    """Cross entropy plus the entropy of right predictions, on answers of the model itself.

    One block of each answer is drawn. Half of its tokens are masked, and in a second copy of the
    batch the other half. Everything after the block is masked too, but not scored. Per copy, the
    loss is mean CE + certainty x mean entropy of softmax(logits / temperature) over the masked
    tokens whose most probable token is right; the two copies are added. The data are answers that
    the model generated. Source: dParallel (arXiv 2509.26488), LLaDA/llada_train.py and
    Dream/dream_train.py. Unlike there, each row has its own mask, and blocks are drawn from those
    that hold tokens.

    Args:
        certainty: weight of the entropy; 2 for LLaDA, 1 for Dream.
        temperature: of the softmax whose entropy is taken.
        share: mask probability within the block.
        block_size: tokens per block; None: the whole answer is one block, as for Dream.
        chunk: positions whose logits exist at a time.
    """

    certainty: NonNegativeFloat = 2.0
    temperature: PositiveFloat = 0.5
    share: UnitFloat = 0.5005
    block_size: PositiveInt | None = 32
    chunk: PositiveInt = 2048

    def corrupt(self, batch: Batch) -> Noise:
        """Random noise in one block of each answer."""
        sequence = batch.sequence
        answer = sequence.is_answer
        block, drawn = self.blocks(batch)
        noise = uniform(batch.seeds, answer.shape[1], stream=3).flip(1)
        maskable = answer & (block == drawn)
        p = torch.full(answer.shape, self.share, device=answer.device)
        masked, covered = maskable & (noise < self.share), answer & (block > drawn)
        return Noise(masked, maskable, sequence.mask, p, torch.ones_like(p), covered)

    def blocks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Block of each answer token, and the block that is trained in its turn; int64 [B L]."""
        sequence = batch.sequence
        if self.block_size is None:
            return torch.zeros_like(sequence.role), torch.zeros_like(sequence.role)
        turn = turns(sequence)
        order, length = answer_order(sequence, turn)
        u = uniform_at(batch.seeds, turn, stream=5)
        blocks = -(-length // self.block_size)
        return order // self.block_size, (u * blocks).long()

    def loss(self, model: MultimodalDLM, batch: Batch, noise: Noise) -> Losses:
        """The sum of both copies' losses."""
        rows = torch.arange(len(noise.masked), device=noise.masked.device)
        sequence = chosen(batch.sequence, rows.repeat(2))
        noise = noise.joined(noise.complement())
        at = scored(model, sequence, noise)
        clean, given = sequence.tokens[at], noisy(model, sequence, noise)
        losses, entropy, right = measured(model, given, at, self.chunk, self.measure, clean)
        is_first = (at.nonzero()[:, 0] < len(rows)).float()
        terms = []
        for copy in (is_first, 1 - is_first):
            terms.append(((losses * copy).sum(), copy.sum(), 1.0))
            hits = right * copy
            terms.append(((entropy * hits).sum(), hits.sum(), self.certainty))
        count = torch.ones_like(right).sum()
        logs = {
            "ce": (losses.detach().sum(), count),
            "accuracy": (right.sum(), count),
            "entropy": ((entropy.detach() * right).sum(), right.sum()),
        }
        (total, number, _), *extra = terms
        return Losses(total, number, logs, tuple(extra))

    def measure(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy, entropy, and 1 where the prediction is right; [n] each."""
        losses = F.cross_entropy(logits, target, reduction="none")
        log = (logits / self.temperature).log_softmax(-1)
        right = (logits.detach().argmax(-1) == target).float()
        return losses, -(log.exp() * log).sum(-1), right


def answer_order(sequence: Sequence, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each answer token in its answer, and the answer's length; int64 [B L].

    Args:
        sequence: a batch.
        turn: [B L] int64, turn of each token.
    """
    answer, beyond = sequence.is_answer, sequence.positions.max() + 1
    size = int(turn.max()) + 1
    first = beyond.repeat(len(turn), size)
    positions = sequence.positions.masked_fill(~answer, int(beyond))
    first = first.scatter_reduce(1, turn, positions, "amin").gather(1, turn)
    length = torch.zeros_like(turn[:, :1]).repeat(1, size).scatter_add(1, turn, answer.long())
    return (sequence.positions - first).clamp(min=0), length.gather(1, turn)
