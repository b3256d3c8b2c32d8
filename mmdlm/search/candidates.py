"""Several decodes of one batch: random generators, answer ids and selection per row."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from mmdlm.decoding.decode import Decoded, History
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM


def generators(model: MultimodalDLM, prompt: Tensor | Sequence, seed: int) -> list[torch.Generator]:
    """One generator per batch row with the same seed, so that samples do not depend on the batch.

    Args:
        model: model; the generators are on its device.
        prompt: see `mmdlm.decode`.
        seed: seed of every generator.
    """
    rows = len(prompt if isinstance(prompt, Tensor) else prompt.tokens)
    return [torch.Generator(model.device).manual_seed(seed) for _ in range(rows)]


def answer_ids(model: MultimodalDLM, decoded: Decoded) -> list[list[int]]:
    """Token ids of each row's answer up to its end token."""
    ends = {model.spec.eos_id, *model.spec.stop_ids}
    rows = []
    for ids in decoded.tokens[:, -decoded.history.step.shape[1] :].tolist():
        size = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        rows.append(ids[:size])
    return rows


def select(model: MultimodalDLM, candidates: Items[Decoded], winner: Items[int]) -> Decoded:
    """One decode made of the winning candidate of each row; `nfe` is the sum over all candidates.

    Args:
        model: model; shorter answers are padded with its end token.
        candidates: decodes of the same batch.
        winner: index of the candidate of each row.
    """

    def pick(tensors: list[Tensor], fill: float) -> Tensor:
        size = max(t.shape[1] for t in tensors)
        rows = [tensors[i][row] for row, i in enumerate(winner)]
        return torch.stack(
            [torch.nn.functional.pad(row, (0, size - len(row)), value=fill) for row in rows]
        )

    history = History(
        pick([c.history.step for c in candidates], -1),
        pick([c.history.confidence for c in candidates], 0.0),
    )
    tokens = pick([c.tokens for c in candidates], model.spec.eos_id)
    forwards = tuple(map(sum, zip(*(c.forwards for c in candidates), strict=True)))
    return Decoded(tokens, sum(c.nfe for c in candidates), history, forwards)
