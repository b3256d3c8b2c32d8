"""Learn2PD end-of-text prediction (EoTP): cut the answer after a predicted end token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from encoders.checks import Cutoff
from mmdlm.decoding.numerics import odds_of, ragged
from mmdlm.decoding.resizing import lasting
from mmdlm.decoding.strategy import GONE, Strategy
from mmdlm.decoding.view import View
from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class EndCut(Strategy):
    """Learn2PD EoTP: shortens each row to its predicted end token, before that end is certain.

    The cut is after the first end token that a step commits, or, if it commits none, after the mask
    that predicts one with the highest probability, anywhere in the answer. Given positions stay.
    Approximate: models trained on padded answers predict end tokens from the first step, so answers
    may be cut too early.

    Source: end-of-text prediction of Learn2PD (arXiv 2509.25188;
    ims-kdks/Learning-to-Parallel-Decoding: llada/generate.py, generate_l2p_eot). There, only end
    tokens that its learned filter accepts count as committed; here, all that commit.

    Args:
        tau: probability that a predicted end token must reach if it is not committed; 0 as
            published.
    """

    paper: ClassVar[str] = "Learn2PD (EoTP), arXiv 2509.25188"
    # An end token can be predicted only at positions that are scored.
    requires: ClassVar[frozenset[str]] = frozenset({"full_attention", "all_scored"})
    sees: ClassVar = "answer"

    tau: Cutoff = 0.0

    def prepare(self, model: MultimodalDLM, columns: slice | None) -> dict[str, Any]:
        """The ids that end an answer."""
        ids = [model.spec.eos_id, *model.spec.stop_ids]
        return {"ends": torch.tensor(ids, device=model.device)}

    def resize(self, view: View) -> Tensor | None:
        """[B N] int64, the answers up to their ends; None if no row becomes shorter."""
        ends = torch.isin(view.candidates, view.memory(self)["ends"])
        committed = ends & view.taken
        predicted = ends & view.here(view.masked) & (view.log_odds >= odds_of(self.tau))
        best = view.log_odds.masked_fill(~predicted, -torch.inf).argmax(1)
        chosen = torch.where(committed.any(1), committed.int().argmax(1), best)
        place = view.at.gather(1, chosen[:, None])[:, 0] - view.prompt + 1
        found = committed.any(1) | predicted.any(1)
        cut, sizes = torch.where(found, place, view.length).cpu(), view.lengths
        if not bool((cut < sizes).any()):
            return None
        given = torch.tensor([-1 if at is None else at for at in lasting(view)])
        kept = sizes.minimum(cut.maximum(given + 1))
        if bool((kept == sizes).all()):
            return None
        return ragged([list(range(n)) for n in kept.tolist()], GONE)
