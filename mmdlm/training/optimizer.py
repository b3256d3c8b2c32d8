"""The optimizer and the learning rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from encoders.checks import (
    Above,
    AtLeast,
    Below,
    Checked,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    UnitFloat,
)

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
"""Devices for which torch has a fused AdamW."""


@dataclass(frozen=True)
class AdamW(Checked):
    """AdamW (arXiv 1711.05101).

    Args:
        lr: peak learning rate; `tune` can give parts of the model another one.
        weight_decay: on matrices only.
        betas: decay rates of the averages of gradients and squared gradients.
        layer_decay: the learning rate of a block of the backbone is this factor times that of the
            block after it, and that of the embedding (also as a tied head) is the lowest; final
            norm, head, adapters and encoders have the full one (layer-wise decay, arXiv
            2106.08254). None for equal rates.
        fused: one kernel for all parameters; None where the device supports it.
    """

    lr: PositiveFloat = 6e-4
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[Annotated[float, AtLeast(0), Below(1)], Annotated[float, AtLeast(0), Below(1)]] = (
        0.9,
        0.98,
    )
    layer_decay: Annotated[float, Above(0), Below(1)] | None = None
    fused: bool | None = None

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        """The optimizer of parameter groups, on the devices where the parameters are.

        Args:
            groups: see `mmdlm.training.tune.groups`.
        """
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        fused = devices <= FUSED_DEVICES if self.fused is None else self.fused
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=fused)
        # A fused optimizer would undo the loss scaling of fp16 itself, after gradients are clipped,
        # so Lightning refuses to clip. This way the gradient scaler does it first.
        optimizer._step_supports_amp_scaling = False
        return optimizer


@dataclass(frozen=True)
class Schedule(Checked):
    """Linear warm-up, a plateau, and a decay at the end of the run.

    Args:
        kind: shape of the decay, "cosine" or "linear"; "constant" for none.
        warmup: steps of linear warm-up.
        decay: fraction of the run, at its end, over which the rate decays.
        final: last learning rate as a fraction of the peak.
    """

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: NonNegativeInt = 100
    decay: UnitFloat = 1.0
    final: NonNegativeFloat = 0.05

    def factor(self, step: int, done: float) -> float:
        """Learning rate at a step as a fraction of the peak.

        Args:
            step: from 0.
            done: fraction of the run before this step, 0 if its length is unknown.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        begin = 1 - self.decay
        if self.kind == "constant" or self.decay == 0 or done < begin:
            return 1.0
        past = min(1.0, (done - begin) / self.decay)
        left = 1 - past if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * past))
        return self.final + (1 - self.final) * left
