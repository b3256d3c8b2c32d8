"""Prefix-LM attention: the prompt does not attend to the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class PrefixLM(Strategy):
    """Prefix-LM attention: the prompt of a full-attention model attends to itself only.

    The prompt's keys and values are then final after the first step, and `Exact` computes nothing
    but the answer from there on. Approximate, unless the model was trained with such prompts.

    Source: `prefix_lm=True` of jacklishufan/LaViDa: llava/model/language_model/llada/generate.py.
    """

    paper: ClassVar[str] = "LaViDa, arXiv 2505.16839"

    requires: ClassVar[frozenset[str]] = frozenset({"full_attention"})

    def layout(self, view: View) -> Tensor:
        """[B L] int64, the prompt on a level below the answer."""
        return view.sequence.is_answer.long()
