"""A prompt that does not see the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class PrefixLM(Strategy):
    """Runs a full-attention model with a prompt that attends to itself only.

    The prompt's keys and values are then final after the first step, and `Exact` computes nothing
    but the answer from there on. Approximate, unless the model was trained with such prompts.

    Source: `prefix_lm=True` of jacklishufan/LaViDa: llava/model/language_model/llada/generate.py.
    """

    paper: ClassVar[str] = "LaViDa, arXiv 2505.16839"

    def begin(self, state: DecodeState) -> None:
        """Puts the prompt on a level below the answer.

        Raises:
            ValueError: the model's attention is not full.
        """
        attention = state.model.spec.attention
        if attention != "full":
            raise ValueError(f"PrefixLM is for full attention, this model has {attention}; drop it")
        state.set_levels(state.sequence.is_answer.long())
