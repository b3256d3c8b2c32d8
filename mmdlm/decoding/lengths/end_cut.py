"""Cut off what lies behind a predicted end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.compatibility import full_attention
from mmdlm.decoding.numerics import odds_of, ragged
from mmdlm.decoding.resizing import lasting, lengths
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class EndCut(Strategy):
    """Shortens each row to its predicted end token, long before that end is certain.

    The cut is behind the first end token that a step commits, or, if it commits none, behind the
    mask that predicts one most surely, wherever that is in the answer. Given positions stay.
    Approximate, and bold: models trained on padded answers predict end tokens from the first step.

    Source: end-of-text prediction of Learn2PD (arXiv 2509.25188;
    ims-kdks/Learning-to-Parallel-Decoding: llada/generate.py, generate_l2p_eot). There, only end
    tokens that its learnt filter accepts count as committed; here, all that commit.

    Args:
        tau: probability that an end token must reach without being committed; 0 as published.
    """

    paper: ClassVar[str] = "Learn2PD (EoTP), arXiv 2509.25188"
    # A cut in one row would make a cache forget the others, and what is not computed has no end.
    excludes: ClassVar[tuple[str, ...]] = ("refresh",)
    sees: ClassVar = "answer"

    tau: float = 0.0

    def __post_init__(self) -> None:
        if not self.tau >= 0:
            raise ValueError(f"EndCut.tau is {self.tau}, expected a probability")

    def begin(self, state: DecodeState) -> None:
        """Checks the model.

        Raises:
            ValueError: its attention is not full.
        """
        full_attention(self, state)

    def resize(self, state: DecodeState) -> Tensor | None:
        """[B N] int64, the answers up to their ends; None where no row becomes shorter."""
        spec = state.model.spec
        ids = torch.tensor([spec.eos_id, *spec.stop_ids], device=state.at.device)
        ends = torch.isin(state.candidates, ids)
        committed = ends & state.taken
        guessed = ends & state.here(state.masked) & (state.log_odds >= odds_of(self.tau))
        surest = state.log_odds.masked_fill(~guessed, -torch.inf).argmax(1)
        chosen = torch.where(committed.any(1), committed.int().argmax(1), surest)
        place = state.at.gather(1, chosen[:, None])[:, 0] - state.prompt + 1
        # A row that waits for others is not cut: alone, it would not take this step.
        found = (committed.any(1) | guessed.any(1)) & state.open.any(1)
        cut, sizes = torch.where(found, place, state.length).cpu(), lengths(state)
        if not bool((cut < sizes).any()):
            return None
        given = torch.tensor([-1 if at is None else at for at in lasting(state)])
        kept = sizes.minimum(cut.maximum(given + 1))
        if bool((kept == sizes).all()):
            return None
        return ragged([list(range(n)) for n in kept.tolist()], state.GONE)
