"""Ways to reduce image tokens that compute the same number of them over layers and steps."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.prune_divprune import DivPrune
from adapters.pruner import Pruner
from mmdlm.decoding.pruning.prune_media import PruneMedia
from mmdlm.decoding.pruning.skip_layers import SkipLayers

LATE_SHARE = 0.25
"""Late-step pruning keeps this share of the budget, and so can wait the longer."""


@dataclass(frozen=True)
class Way:
    """One way to spend a budget of image tokens.

    Args:
        name: what is done.
        method: see `mmdlm.decoding.pruning.option.apply`; None: nothing.
        spent: image tokens computed, over all layers and steps, as a share of those without
            pruning.
    """

    name: str
    method: Pruner | PruneMedia | SkipLayers | None
    spent: float


ALL = Way("all tokens", None, 1.0)
PRUNING = ("before the model", "in the first step", "late", "progressive")
SKIPPING = ("skip first layers", "skip last layers", "skip every other layer")


def ways(budget: float, tokens: int, steps: int, layers: int) -> list[Way]:
    """Every way to spend about a budget: the four of `PRUNING`, then the three of `SKIPPING`.

    With T steps, "in the first step" leaves (budget T - 1) / (T - 1) of the tokens after it,
    "progressive" 1.5, 1 and 0.5 times that in thirds of the other steps. "late" computes all
    tokens until the budget is spent but for what `LATE_SHARE` of it needs. Numbers of tokens,
    steps and layers are rounded, so that `Way.spent` differs a little.

    Args:
        budget: share in (0, 1).
        tokens: N, of an image.
        steps: T, of a decode, at least 4.
        layers: of the model, at least 2.

    Raises:
        ValueError: a number is out of range.
    """
    if not 0 < budget < 1 or steps < 4 or layers < 2:
        raise ValueError(
            f"budget is {budget}, with {steps} steps and {layers} layers; expected a share between "
            "0 and 1, at least 4 steps and 2 layers"
        )

    def count(share: float) -> int:
        return max(1, round(share * tokens))

    after = max(0.0, (budget * steps - 1) / (steps - 1))
    few = LATE_SHARE * budget
    whole = max(1, round(steps * (budget - few) / (1 - few)))
    thirds = tuple(round(i * (steps - 1) / 3) for i in range(3))
    skipped = round((1 - budget) * layers)
    every = sorted(range(layers), key=lambda i: (1 - i % 2, i))[:skipped]
    chosen = (range(skipped), range(layers - skipped, layers), sorted(every))
    return [
        Way(PRUNING[0], DivPrune(count(budget)), count(budget) / tokens),
        *(
            _pruned(name, keep, step, tokens, steps)
            for name, keep, step in (
                (PRUNING[1], (count(after),), (0,)),
                (PRUNING[2], (count(few),), (whole - 1,)),
                (PRUNING[3], tuple(count(x * after) for x in (1.5, 1.0, 0.5)), thirds),
            )
        ),
        *(
            Way(name, SkipLayers(tuple(places)), 1 - skipped / layers)
            for name, places in zip(SKIPPING, chosen, strict=True)
        ),
    ]


def _pruned(
    name: str, keep: tuple[int, ...], step: tuple[int, ...], tokens: int, steps: int
) -> Way:
    """A way that prunes after some steps, by the attention of the last layer."""
    left, spent = tokens, 0
    for now in range(steps):
        spent += left
        left = keep[step.index(now)] if now in step else left
    return Way(name, PruneMedia(keep, step=step), spent / (tokens * steps))
