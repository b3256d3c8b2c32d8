"""Schedules: the mask probability as a function of the noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from encoders.checks import Checked, NonNegativeFloat, PositiveFloat, UnitFloat

LEAST = 1e-3
"""Lowest mask probability of the power schedule (kuleshov-group/bd3lms: noise_schedule.py)."""


@dataclass(frozen=True)
class Schedule(Checked):
    """Mask probability p(t) = low + (high - low) f(t) for noise levels t in [0, 1].

    f by kind:
    - linear: t. LLaDA and most others; high 0.999 is LogLinear of kuleshov-group/mdlm.
    - cosine: sin(pi t / 2). ZHZisZZ/dllm: dllm/core/schedulers/alpha.py; MaskGIT.
    - mdlm_cosine: 1 - cos(pi t / 2). Cosine of mdlm with high 0.999, of kuleshov-group/bd3lms with
      low 0.001 and guard 0.001.
    - cosine_squared: sin(pi t / 2)^2. CosineSqr of mdlm with high 0.999.
    - geometric: 1 - exp(-sigma), sigma from 0.001 at t = 0 to 1 at t = 1. Geometric of mdlm.
    - power: t^power, at least 0.001. Exp of bd3lms.
    - logarithmic: log2(1 + t). Logarithmic of bd3lms.

    The weight "schedule" of an objective is p'(t) / (p(t) + guard), which is -alpha'/(1 - alpha)
    with alpha = 1 - p, and d sigma / (exp(sigma) - 1) with sigma = -log(1 - p).

    Args:
        kind: f, see above.
        low: mask probability where f is 0.
        high: mask probability where f is 1.
        power: exponent of kind "power".
        guard: added to the divisor of the weight; 1e-6 in dllm.
    """

    kind: Literal[
        "linear",
        "cosine",
        "mdlm_cosine",
        "cosine_squared",
        "geometric",
        "power",
        "logarithmic",
    ] = "linear"
    low: UnitFloat = 0.0
    high: UnitFloat = 1.0
    power: PositiveFloat = 1.0
    guard: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        """Checks the fields, and that p grows with t."""
        super().__post_init__()
        if self.low >= self.high:
            raise ValueError(
                f"Schedule.low is {self.low} and high {self.high}, expected low below high"
            )

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mask probability p and slope dp/dt, both shaped like t.

        Args:
            t: float64 noise levels in [0, 1].
        """
        p, slope = self._base(t)
        width = self.high - self.low
        return (p, slope) if width == 1 else (self.low + width * p, width * slope)

    def weight(self, t: Tensor) -> Tensor:
        """The weight "schedule" at noise levels t."""
        p, slope = self(t)
        return slope / (p + self.guard)

    def _base(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """F and its derivative."""
        quarter = math.pi / 2
        match self.kind:
            case "linear":
                return t, torch.ones_like(t)
            case "cosine":
                return (quarter * t).sin(), quarter * (quarter * t).cos()
            case "mdlm_cosine":
                return 2 * (quarter * t / 2).sin() ** 2, quarter * (quarter * t).sin()
            case "cosine_squared":
                return (quarter * t).sin() ** 2, quarter * (math.pi * t).sin()
            case "geometric":
                sigma = torch.exp((1 - t) * math.log(1e-3))
                return -torch.expm1(-sigma), -math.log(1e-3) * sigma * torch.exp(-sigma)
            case "power":
                return (t**self.power).clamp(min=LEAST), self.power * t ** (self.power - 1)
            case "logarithmic":
                return torch.log1p(t) / math.log(2), 1 / ((1 + t) * math.log(2))
