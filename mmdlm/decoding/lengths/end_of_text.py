"""Early stop of a row whose text has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class EndOfText(Strategy):
    """Early stop: fills the rest of a row with end tokens once an end token has no mask before it.

    What stands before the end token is untouched; only positions a reader never sees are saved.

    Source: early stop of inclusionAI/dInfer and ML-GSAI/LLaDA-V, made per row.
    """

    paper: ClassVar[str] = "dInfer, arXiv 2510.08666"
    exact: ClassVar[bool] = True

    def end(self, view: View) -> Tensor:
        """[B L] bool, the masks after each row's first end token."""
        spec = view.model.spec
        tokens = view.tokens
        known = tokens != spec.mask_id
        ends = torch.zeros_like(known)
        for stop_id in {spec.eos_id, *spec.stop_ids}:
            ends |= tokens == stop_id
        ends[:, : view.prompt], known[:, : view.prompt] = False, True
        ended = ends & known.long().cumprod(1).bool()
        return (ended.long().cumsum(1) > 0) & ~known
