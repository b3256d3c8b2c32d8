"""The sums and counts of a step over all processes, with one collective call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.objectives.objective import Losses


@dataclass(frozen=True)
class Totals:
    """Counts and metrics of one step over all processes, still on the device.

    Args:
        values: float32 [M], everything that was summed.
        counts: by data set, where the counts of its loss and extra losses are in `values`.
        metrics: by "<data set>/<metric>", where its sum is in `values`; its count follows.
    """

    values: Tensor
    counts: dict[str, slice]
    metrics: dict[str, int]

    def mean(self, name: str, losses: Losses) -> Tensor:
        """This process's share of the loss of a data set: its sum over the global count."""
        return losses.mean(self.values[self.counts[name]].unbind())

    def means(self) -> dict[str, Tensor]:
        """Every metric that counted anything, as float32 scalars on the CPU.

        Waits for the device once.
        """
        values = self.values.cpu()
        return {
            name: values[at] / values[at + 1]
            for name, at in self.metrics.items()
            if values[at + 1] > 0
        }


def totals(
    losses: Mapping[str, Losses], device: torch.device, over: Callable[[Tensor], Tensor]
) -> Totals:
    """Sums and counts of all data sets of a step.

    Args:
        losses: by data set.
        device: where the sum over processes is computed.
        over: adds a vector up over all processes; called once.
    """
    values: list[Tensor] = []
    counts, metrics = {}, {}
    for name, each in losses.items():
        counts[name] = slice(len(values), len(values) + len(each.counts))
        values += each.counts
        for metric, pair in each.logs.items():
            metrics[f"{name}/{metric}"] = len(values)
            values += pair
    scalars = [value.detach().to(device, torch.float32).reshape(()) for value in values]
    return Totals(over(torch.stack(scalars)), counts, metrics)
