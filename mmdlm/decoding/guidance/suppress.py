"""Tokens that are never written."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class Suppress(Strategy):
    """Forbids some ids.

    Source: suppressed tokens of ML-GSAI/LLaDA-V; `logits_eos_inf` of ML-GSAI/LLaDA: generate.py.

    Args:
        ids: token ids.
        eos: also forbid the ids that end the model's answers.
    """

    paper: ClassVar[str] = "LLaDA-V, arXiv 2505.16933"

    ids: Items[int] = ()
    eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))

    def begin(self, view: View) -> None:
        """Turns ids into columns of the logits.

        Raises:
            ValueError: an id is not in the vocabulary, or none is left.
        """
        spec, vocab = view.model.spec, view.model.spec.transformer.vocab
        for token in self.ids:
            if not 0 <= token < vocab:
                raise ValueError(
                    f"Suppress.ids holds {token}; this model's ids are 0 to {vocab - 1}"
                )
        first, stop = (
            (0, vocab) if view.columns is None else (view.columns.start, view.columns.stop)
        )
        gone = {*self.ids, *((spec.eos_id, *spec.stop_ids) if self.eos else ())}
        if not set(range(first, stop)) - gone - {spec.mask_id}:
            raise ValueError("Suppress forbids every id that could be written; keep at least one")
        view.memory[self] = sorted(token - first for token in gone if first <= token < stop)

    def guide(self, view: View, logits: Tensor) -> Tensor:
        """[B R V] with -inf in the forbidden columns."""
        logits[..., view.memory[self]] = -torch.inf
        return logits
