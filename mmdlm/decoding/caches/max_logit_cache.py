"""Max-logit cache (ML-Cache) of Lumina-DiMOO: positions of low confidence are recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoders.checks import PositiveInt, UnitFloat
from mmdlm.decoding.memory import Entry, PerCanvas
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class MaxLogitCache(Strategy):
    """ML-Cache: recomputes the positions whose highest logit was low at their latest forward.

    The first `warmup` of the steps and every `interval`-th step after them compute everything. The
    other steps compute the positions of prompt and answer whose highest logit (among the ids that
    may be committed) is at most the (1 - ratio) quantile of the row, each alternative prompt by
    its own logits. Other positions keep their keys, values and logits; open ones among them are
    committed from these. Memory: [B L V] float32 per prompt, V ids that may be committed.

    Source: Alpha-VLLM/Lumina-DiMOO: generators/image_generation_generator.py.

    Args:
        ratio: share of the positions that are reused.
        warmup: share of the steps that compute everything at first.
        interval: steps from one full computation to the next after that.
        steps: steps of the whole decode, which `warmup` refers to.
    """

    paper: ClassVar[str] = "Lumina-DiMOO, arXiv 2510.06308"
    requires: ClassVar[frozenset[str]] = frozenset({"full_attention", "fixed_length"})
    denies: ClassVar[frozenset[str]] = frozenset({"plain_cache"})  # it holds logits too

    ratio: UnitFloat = 0.9
    warmup: UnitFloat = 0.3
    interval: PositiveInt = 5
    steps: PositiveInt = 64

    def begin(self, view: View) -> dict[str, Entry]:
        """No logits."""
        columns = view.columns
        vocab = view.model.spec.transformer.vocab
        width = vocab if columns is None else columns.stop - columns.start
        return {"logits": PerCanvas(torch.zeros(*view.tokens.shape, width, device=view.device))}

    def refresh(self, view: View) -> Refresh:
        """All positions of a row, or those of low confidence."""
        stored, real = view.memory(self)["logits"], view.level >= 0
        compute = real.clone()
        for i, step in enumerate(view.step.tolist()):
            if not self.is_full(step):
                compute[i] = self._low(stored[i], real[i], view.model.spec.shift)
        return Refresh(compute, logits=stored)

    def is_full(self, step: int) -> bool:
        """Whether a step (0-based) computes everything."""
        warm = int(self.steps * self.warmup)
        return step <= warm or (step - warm) % self.interval == 0

    def _low(self, logits: Tensor, real: Tensor, shift: bool) -> Tensor:
        """[L] host bool, the positions of a row to compute."""
        highest, ranked = logits.amax(-1).cpu(), real
        if shift:  # position i scores i + 1, and the last one nothing
            highest = highest.roll(-1)
            ranked = real & real.roll(-1)
            ranked[-1] = False
        bound = torch.quantile(highest[ranked], 1 - self.ratio)
        return real & ~(ranked & (highest > bound))
