"""Suppressed tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class Suppress(Strategy):
    """Token suppression: sets the logits of some ids to -inf.

    Source: suppressed tokens of ML-GSAI/LLaDA-V; `logits_eos_inf` of ML-GSAI/LLaDA: generate.py.

    Args:
        ids: token ids.
        eos: also forbid the ids that end the model's answers.
    """

    paper: ClassVar[str] = "LLaDA-V, arXiv 2505.16933"

    ids: tuple[int, ...] = ()
    eos: bool = False

    def prepare(self, model: MultimodalDLM, columns: slice | None) -> dict[str, Any]:
        """Turns ids into columns of the logits.

        Raises:
            ValueError: an id is not in the vocabulary, or none is left.
        """
        spec, vocab = model.spec, model.spec.transformer.vocab
        for token in self.ids:
            if not 0 <= token < vocab:
                raise ValueError(
                    f"Suppress.ids holds {token}; this model's ids are 0 to {vocab - 1}"
                )
        first, stop = (0, vocab) if columns is None else (columns.start, columns.stop)
        gone = {*self.ids, *((spec.eos_id, *spec.stop_ids) if self.eos else ())}
        if not set(range(first, stop)) - gone - {spec.mask_id}:
            raise ValueError("Suppress forbids every id that could be written; keep at least one")
        return {"columns": sorted(token - first for token in gone if first <= token < stop)}

    def guide(self, view: View, logits: Tensor) -> Tensor:
        """[B R V] with -inf in the forbidden columns, changed in place."""
        logits[..., view.memory(self)["columns"]] = -torch.inf
        return logits
