"""Auxiliary loss that aligns media embeddings with the backbone's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from encoders.checks import Checked, PositiveInt
from mmdlm.objectives.objective import Batch, Losses, Objective

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class Grounded(Checked, Objective):
    """Another objective plus a loss that predicts what each media token shows.

    The head is applied to the media embeddings directly, before any block of the backbone. For an
    image: cross entropy with the words of each token's cell, spread evenly; the target of an empty
    cell is the pad token. For audio: connectionist temporal classification (CTC) of the spoken
    words (Graves et al. 2006; combined with attention as in arXiv 1609.06773), blank = the pad
    token. An encoder trained from scratch through attention alone stays on a long plateau, where
    the model learns only the grammar of the answers; this loss ends it within a few hundred steps.
    Samples without names contribute no loss.

    Args:
        objective: the main objective; None trains only the encoders and skips the backbone.
        weight: weight of the naming loss.
        chunk: media tokens whose logits exist at a time; at least one image or clip.
    """

    objective: Objective | None = None
    weight: float = 1.0
    chunk: PositiveInt = 2048

    def step(self, model: MultimodalDLM, batch: Batch) -> Losses:
        """The main loss, with the naming loss as an extra term."""
        total, count = self.named(model, batch)
        logs = {"naming": (total.detach(), count)}
        if self.objective is None:
            return Losses(total, count, logs)
        main = self.objective.step(model, batch)
        extra = (*main.extra, (total, count, self.weight))
        return Losses(main.sum, main.count, {**main.logs, **logs}, extra)

    def named(self, model: MultimodalDLM, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum and count of the naming loss; without names, a zero that has a gradient graph."""
        if not batch.names:
            media = [x for items in batch.media.values() for x in items]
            zero = sum(x.sum() for x in media) * 0.0 if media else torch.zeros(())
            return zero, torch.zeros(())
        is_speech = isinstance(batch.names[0], Tensor)
        media = batch.media["audio" if is_speech else "image"]  # a robot's state has no names
        parts = groups(media, batch.names, self.chunk)
        if len(parts) == 1 or not torch.is_grad_enabled():
            losses = [self._named(model, *part) for part in parts]
        else:
            losses = [checkpoint(self._named, model, *p, use_reentrant=False) for p in parts]
        totals, counts = zip(*losses, strict=True)
        return sum(totals), sum(counts)

    def _named(
        self, model: MultimodalDLM, media: list[Tensor], names: list
    ) -> tuple[Tensor, Tensor]:
        """Sum and count of the naming loss of some images or clips."""
        logits = [model.backbone.head(model.backbone.norm(x)).float() for x in media]
        if isinstance(names[0], Tensor):
            return self.spoken(logits, names, model.spec.pad_id)
        return self.shown(logits, names, model.spec.pad_id)

    @staticmethod
    def spoken(logits: list[Tensor], names: list[Tensor], blank: int) -> tuple[Tensor, Tensor]:
        """Sum over clips of -log p(words), and the number of words.

        Args:
            logits: [N V] of each clip.
            names: int64 [words] of each clip, N or fewer.
            blank: CTC blank id.
        """
        lengths = torch.tensor([len(x) for x in logits])
        words = torch.tensor([len(x) for x in names])
        padded = torch.nn.utils.rnn.pad_sequence([x.log_softmax(-1) for x in logits])  # [N B V]
        targets = torch.cat(list(names)).to(padded.device)
        loss = F.ctc_loss(
            padded, targets, lengths, words, blank, reduction="sum", zero_infinity=True
        )
        return loss, words.sum().float()

    @staticmethod
    def shown(
        logits: list[Tensor], names: list[list[Tensor]], ground: int
    ) -> tuple[Tensor, Tensor]:
        """Sum over tokens of the cross entropy with their words, and the number of tokens.

        Args:
            logits: [N V] of each image.
            names: int64 [words] of each token of each image.
            ground: target id of an empty cell.
        Raises:
            ValueError: the number of tokens of an image differs from the number of its names.
        """
        scores = torch.cat(logits)
        words = [w if len(w) else torch.tensor([ground]) for image in names for w in image]
        if len(words) != len(scores):
            raise ValueError(
                f"the data set names {len(words)} tokens, the model has {len(scores)} for the same "
                "images; set the data set's cells to the model's grid"
            )
        token = torch.cat([torch.full((len(w),), i) for i, w in enumerate(words)])
        share = torch.cat([torch.full((len(w),), 1 / len(w)) for w in words])
        log = scores.log_softmax(-1)[token, torch.cat(words).to(scores.device)]
        return -(log * share.to(log.device)).sum(), torch.tensor(float(len(words)))


def groups(media: list[Tensor], names: list, chunk: int) -> list[tuple[list[Tensor], list]]:
    """Consecutive items of at most `chunk` tokens together, or a single larger one, with names.

    Args:
        media: [N D] of each item.
        names: of each item. One group is made if these are of samples that have several items.
        chunk: number of tokens.
    """
    if len(media) != len(names):
        return [(media, names)]
    found: list[tuple[list[Tensor], list]] = []
    room = 0
    for item, words in zip(media, names, strict=True):
        if len(item) > room:
            found.append(([], []))
            room = chunk
        room -= len(item)
        found[-1][0].append(item)
        found[-1][1].append(words)
    return found
