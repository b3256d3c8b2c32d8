"""Contrastive fine-tuning for retrieval: a prompt and its answer have similar vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from encoders.checks import Checked, PositiveFloat, PositiveInt
from mmdlm.layout import chosen
from mmdlm.objectives.objective import Batch, Losses, Objective
from mmdlm.representation import part, similarity, sparse, vectors, with_masks

if TYPE_CHECKING:
    from mmdlm.layout import Sequence
    from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class Contrastive(Checked, Objective):
    """InfoNCE with the other rows of the batch as negatives, in both directions.

    The query of a row is its prompt (a picture with an instruction, a question), its document the
    answer, each encoded by itself. Rows with the same answer are not negatives of each other. Data
    of any form can be used: pictures with captions give a search for pictures by text, and back.

    With `masks`, K mask tokens follow query and document, and their hidden states are the vectors,
    from one forward (DiffRetriever): the score is the mean over the query's vectors of the best
    match. Negatives are those of one process and data set.

    Source: VLM2Vec-style fine-tuning of diffusion models (arXiv 2602.06056); representative tokens
    and their sparse weights as DiffRetriever, K = 4, temperature 0.01.

    Args:
        temperature: divides the similarities.
        pooling: see `mmdlm.representation.Pooling`; not used with `masks`.
        masks: K; None for one pooled vector.
        sparse_weight: weight of a second loss on the dot products of term weights, without a
            temperature; needs `masks`.
        rows: rows whose activations exist at a time; each such part is computed again in the
            backward pass, so that memory does not grow with the batch and the loss is the same
            (GradCache, arXiv 2101.06983). None: all.
    """

    temperature: PositiveFloat = 0.05
    pooling: Literal["mean", "text", "last"] = "mean"
    masks: PositiveInt | None = None
    sparse_weight: float = 0.0
    rows: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparse_weight and self.masks is None:
            raise ValueError(
                f"Contrastive: sparse_weight={self.sparse_weight} without masks, whose logits it "
                "is about; set masks, such as 4"
            )

    def step(self, model: MultimodalDLM, batch: Batch) -> Losses:
        """Mean loss of both directions over the rows.

        Raises:
            ValueError: there is one row only, which has no negatives, or rows share media.
        """
        sequence = batch.sequence
        count = len(sequence.tokens)
        if count < 2:
            raise ValueError("Contrastive: the batch has one row; use a batch size of at least 2")
        if sequence.branch is not None:
            raise ValueError("Contrastive: rows have several turns; use one question per row")
        (queries, terms), (documents, weights) = (
            self._encoded(model, part(model, sequence, answers)) for answers in (False, True)
        )
        same = _same(sequence)
        scores = similarity(queries, documents)
        total, right = _info_nce(scores / self.temperature, same)
        number = total.new_tensor(float(count))
        logs = {"recall@1": (right, number), "positive": (scores.diagonal().sum(), number)}
        if not self.sparse_weight:
            return Losses(total, number, logs)
        second, found = _info_nce(terms @ weights.T, same)
        logs["recall@1 sparse"] = (found, number)
        return Losses(total, number, logs, ((second, number, self.sparse_weight),))

    def _encoded(self, model: MultimodalDLM, sequence: Sequence) -> tuple[Tensor, Tensor | None]:
        """Vectors [B K D] of the rows, and their term weights [B V]."""
        if self.masks is not None:
            sequence = with_masks(model, sequence, self.masks)
        if self.rows is None or self.rows >= len(sequence.tokens):
            return self._of(model, sequence)
        found = []
        for at in torch.arange(len(sequence.tokens), device=sequence.tokens.device).split(
            self.rows
        ):
            some = chosen(sequence, at)
            media = some.media
            # The embeddings of media are an argument, so that their gradient reaches the encoders.
            found.append(
                checkpoint(
                    lambda media, some=some: self._of(model, replace(some, media=media)),
                    media,
                    use_reentrant=False,
                )
            )
        dense, terms = zip(*found, strict=True)
        return torch.cat(dense), None if terms[0] is None else torch.cat(terms)

    def _of(self, model: MultimodalDLM, sequence: Sequence) -> tuple[Tensor, Tensor | None]:
        how = self.pooling if self.masks is None else "masks"
        terms = sparse(model, sequence) if self.sparse_weight else None
        return vectors(model, sequence, how), terms


def _same(sequence: Sequence) -> Tensor:
    """[B B] bool, other rows with the same answer."""
    answers = sequence.tokens.masked_fill(~sequence.is_answer, -1)
    same = (answers[:, None] == answers[None]).all(2)
    return same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)


def _info_nce(scores: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of the mean cross entropy of both directions, and hits of the first.

    Args:
        scores: [B B], queries by documents; the diagonal holds the pairs.
        same: [B B] bool, what is neither a pair nor a negative.
    """
    scores = scores.masked_fill(same, -torch.inf)
    target = torch.arange(len(scores), device=scores.device)
    both = [F.cross_entropy(each, target, reduction="sum") for each in (scores, scores.T)]
    return (both[0] + both[1]) / 2, (scores.argmax(1) == target).float().sum()
