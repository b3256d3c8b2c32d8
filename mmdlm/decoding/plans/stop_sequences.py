"""LLaDA-V stop sequences: fill only what stands before a stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.memory import Entry, PerRow
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class StopSequences(Strategy):
    """Stop sequences: once one stands anywhere in an answer, only the masks before it are filled.

    The masks after it stay masks until then, and become end tokens. The schedule is that of the
    whole block. Text after the answer that is given beforehand is left as it is.

    Source: `stopping_criteria` of ML-GSAI/LLaDA-V: train/llava/model/language_model/
    modeling_llada.py (generate_with_embeds), which also cuts the answer at the stop.

    Args:
        ids: token ids of each sequence, at least one of one id.
    """

    paper: ClassVar[str] = "LLaDA-V, arXiv 2505.16933"

    ids: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.ids):
            raise ValueError(f"StopSequences.ids is {self.ids}, expected no empty sequence")

    def begin(self, view: View) -> dict[str, Entry]:
        """Where the open part of each answer ends, counted from the start of the answer."""
        return {"end": PerRow(torch.full((len(view.tokens),), view.length))}

    def narrow(self, view: View) -> Tensor:
        """[B L] bool, what stands before the stop of the step before, if that is still there."""
        end = torch.maximum(view.memory(self)["end"], self._stops(view))
        return torch.arange(view.length) - view.prompt < end[:, None]

    def replan(self, view: View) -> Tensor | None:
        """[B L] bool, what stands before the stop, which the step before may have written."""
        if not self.ids:
            return None
        view.memory(self)["end"] = end = self._stops(view)
        return torch.arange(view.length) - view.prompt < end[:, None]

    def end(self, view: View) -> Tensor:
        """[B L] bool, the masks after the stop of rows without masks before it."""
        masked = view.masked
        stops = self._stops(view).to(masked.device)[:, None]
        after = torch.arange(view.length, device=masked.device) - view.prompt >= stops
        return masked & after & ~(masked & ~after).any(1, keepdim=True)

    def _stops(self, view: View) -> Tensor:
        """[B] host int64, where the first stop begins within each answer; L for none."""
        answer = view.tokens[:, view.prompt :]
        real = view.answer[:, view.prompt :].to(answer.device)
        found = torch.full((len(answer),), view.length, device=answer.device)
        for ids in self.ids:
            width = answer.shape[1] - len(ids) + 1
            if width < 1:
                continue
            same = torch.ones_like(answer[:, :width], dtype=torch.bool)
            for offset, number in enumerate(ids):
                part = slice(offset, offset + width)
                same &= (answer[:, part] == number) & real[:, part]
            first = torch.where(same.any(1), same.int().argmax(1), view.length)
            found = torch.minimum(found, first)
        return found.cpu()
