"""Fast-dLLM factor rule: the required probability grows with the number of commits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoders.checks import Limit
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Factor(Strategy):
    """Fast-dLLM factor rule: commits the n best while the n-th has p >= 1 - factor / (n + 1).

    The first rank that fails ends the list; the best one never fails. As in the reference, a
    failure of the very last rank has no effect: if all masks but the least confident one pass,
    all are committed.

    Source: Fast-dLLM (arXiv 2505.22618, section 3.3; NVlabs/Fast-dLLM: llada/generate.py,
    get_transfer_index_dynamic).

    Args:
        factor: 0 or more; larger commits more.
    """

    paper: ClassVar[str] = "Fast-dLLM, arXiv 2505.22618"

    factor: Limit = 1.0

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        is_open = view.open
        odds = view.log_odds.masked_fill(~is_open, -torch.inf)
        place = rank(odds)
        # 1 - p from the odds: exact where p itself would round to 1.
        doubt = (-odds).sigmoid()
        fails = is_open & (place > 0) & (doubt > self.factor / (place + 2))
        masks = is_open.sum(1, keepdim=True)
        passed = torch.where(fails, place, masks).amin(1, keepdim=True)
        return place < torch.where(passed >= masks - 1, masks, passed)
