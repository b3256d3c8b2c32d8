"""Whose action and state statistics a policy has that is trained further."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from adapters.normalize import NEEDS, Normalizer
from mmdlm.model import MultimodalDLM


def settle(
    model: MultimodalDLM,
    statistics: dict[str, Any],
    source: str,
    keep: Literal["data", "source"] | None,
) -> None:
    """Gives a policy the statistics of the data, or says which of the data its own would clip.

    Args:
        model: a policy, changed in place.
        statistics: "action" and "state" of the data.
        source: where the model is from, for messages.
        keep: "source" keeps the policy's own statistics; else it gets those of the data.

    Raises:
        ValueError: the states of the data have another size than the model's state encoder takes.
    """
    robot = model.robot
    own = {"action": robot.action, "state": robot.state}
    # A policy without state input has an identity in its place.
    other = [n for n in own if own[n].mode != "identity" and own[n].statistics != statistics[n]]
    if not other:
        return
    if own["state"].size not in (None, len(statistics["state"]["mean"])):
        raise ValueError(
            f"the states of the data have {len(statistics['state']['mean'])} numbers, but the "
            f"state encoder of {source} takes {own['state'].size}; train a new model (blueprint), "
            "or select a feature of that size (state=...)"
        )
    shown = " and ".join(f"{n} {_range(own[n].statistics)}" for n in other)
    found = " and ".join(f"{n} {_range(statistics[n])}" for n in other)
    if keep == "source":
        rank_zero_info(
            f"{source} keeps its own statistics ({shown}); the data have {found}, and values "
            "outside the range of the policy are clipped"
        )
        return
    new = {n: normalizer(statistics[n], own[n]) if n in other else own[n] for n in own}
    model.robot = replace(robot, **new, dataset=None)
    again = "" if keep else "; keep its own with --model.statistics source"
    rank_zero_info(f"{source} gets the statistics of the data: {found} in place of {shown}{again}")


def normalizer(statistics: dict[str, Any], like: Normalizer) -> Normalizer:
    """A normalizer of other statistics that works like another one."""
    mask = like.to_dict()["mask"]
    if mask is not None and len(mask) != len(statistics["mean"]):
        mask = None
    return Normalizer(statistics, like.mode, mask, like.zero_constant)


def _range(statistics: dict[str, Any]) -> str:
    """The smallest and the largest value of all dimensions, as far as they are known."""
    names = next((names for names in NEEDS.values() if {*names} <= statistics.keys() and names), ())
    low, high = (torch.tensor(statistics[name], dtype=torch.float64) for name in names)
    if names == NEEDS["zscore"]:
        low, high = low - high, low + high
    return f"{low.min():.4g}..{high.max():.4g}"
