"""MaskGIT sampling of image codes: random draws, and the least confident ones masked again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from encoders.checks import NonNegativeFloat, PositiveInt
from mmdlm.decoding.memory import Entry, PerCanvas
from mmdlm.decoding.schedules import kept, share
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View

TINY = 1e-20  # bound of the references below logarithms


@dataclass(frozen=True)
class RandomTopK(Strategy):
    """MaskGIT sampling with randomised confidences, as image generators of this kind decode.

    A code is drawn for every open position. Its confidence is log p + t g with p its probability
    and g a Gumbel number. Of N masks at first, the floor(N m(r)) least confident ones (at least
    one) stay masked after step i of S, with r = (i + 1) / S and m the schedule, see `MaskGIT`;
    "sigmoid" is another one. The last step commits all.

    "mmada" draws codes from the probabilities, keeps at least one mask until the last step, and
    multiplies t by 1 - r in every step, also by those of earlier steps. Random numbers are drawn
    for all codes of the answer. "lumina" draws codes by Gumbel-max at temperature t, which stays,
    and commits at least one in every step; only open positions draw.

    The published codes follow from `Streams.exactly` with a generator of the same seed on a CPU.

    Source: Gen-Verse/MMaDA: models/modeling_mmada.py (t2i_generate), models/sampling.py;
    Alpha-VLLM/Lumina-DiMOO: generators/image_generation_generator.py, utils/generation_utils.py.

    Args:
        steps: steps for the whole answer, split evenly over the blocks.
        schedule: share of the masks by the share of the steps done.
        temperature: t; 0 ranks by probability alone ("lumina" then takes the likeliest code).
        sampler: see above.
    """

    paper: ClassVar[str] = "MaskGIT, arXiv 2202.04200"
    may_idle: ClassVar[bool] = True

    steps: PositiveInt = 18
    schedule: str = "cosine"
    temperature: NonNegativeFloat = 1.0
    sampler: Literal["mmada", "lumina"] = "mmada"

    def __post_init__(self) -> None:
        super().__post_init__()
        share(1, 1, self.schedule)

    def begin(self, view: View) -> dict[str, Entry]:
        """The positions that hold a code at the end."""
        first, columns = view.first_id, view.columns
        stop = view.model.spec.transformer.vocab if columns is None else columns.stop
        is_code = (view.tokens >= first) & (view.tokens < stop)
        return {"codes": PerCanvas((is_code | view.masked).cpu() & view.answer)}

    def pick(self, view: View, logits: Tensor) -> Tensor:
        """[B R] int64."""
        logits = view.ban_mask(logits)
        if self.sampler == "mmada":
            return view.multinomial(logits, view.memory(self)["codes"])
        if self.temperature == 0:
            return logits.argmax(-1)
        return (logits / self.temperature + gumbel(view.uniform(logits.shape[-1]))).argmax(-1)

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """[B R] float32."""
        p = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
        if self.sampler == "mmada":
            draws = view.uniform_at(view.memory(self)["codes"]).gather(1, view.at)
        else:
            draws = view.uniform()
        now = zip(view.block_step.tolist(), self._steps(view), strict=True)
        t = torch.tensor([self._temperature(step, steps) for step, steps in now], device=p.device)
        return p.clamp(min=TINY).log() + t[:, None] * gumbel(draws)

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        stay = torch.tensor(
            [
                self._stay(masks, steps, step, unknown)
                for masks, steps, step, unknown in zip(
                    view.block_masks.tolist(),
                    self._steps(view),
                    view.block_step.tolist(),
                    view.open.sum(1).tolist(),
                    strict=True,
                )
            ],
            device=view.device,
        )
        confidence = view.confidence.masked_fill(~view.open, torch.inf)
        ranked = torch.cat(
            [confidence.sort(1).values, confidence.new_full((len(stay), 1), 1e38)], 1
        )
        return view.open & (confidence >= ranked.gather(1, stay[:, None]))

    def _stay(self, masks: int, steps: int, step: int, unknown: int) -> int:
        """Open positions that stay masked after a step."""
        if step >= steps - 1 or unknown == 0:
            return 0
        count = kept(masks, steps, self.schedule)[step]
        if self.sampler == "mmada":
            return max(1, min(unknown - 1, count))
        return min(unknown - 1, max(1, count))

    def _temperature(self, step: int, steps: int) -> float:
        if self.sampler == "lumina":
            return self.temperature
        done = range(min(step + 1, steps))
        return self.temperature * math.prod(1.0 - (i + 1) / steps for i in done)

    def _steps(self, view: View) -> list[int]:
        """Steps of each row's block."""
        return view.share(self.steps).tolist()


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel numbers of uniform ones."""
    return -(-uniform.clamp(min=TINY).log()).clamp(min=TINY).log()
