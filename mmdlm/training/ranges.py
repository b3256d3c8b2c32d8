"""Whose action and state statistics a policy has that is trained further."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from adapters.normalize import NEEDS, Normalizer
from mmdlm.model import MultimodalDLM


def settle(
    model: MultimodalDLM,
    statistics: dict[str, Any],
    source: str,
    keep: Literal["data", "source"] | None,
) -> None:
    """Gives a policy the statistics of the data, unless its own fit them.

    Statistics of the same robot are better kept: the tokens of actions and states then mean what
    they meant, and less has to be learned.

    Args:
        model: a policy, changed in place.
        statistics: "action" and "state" of the data.
        source: where the model is from, for messages.
        keep: "source" keeps the policy's own statistics, "data" takes those of the data. None: the
            policy's own if the data are within their ranges, see `fits`.

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
    if keep is None and all(fits(own[n].statistics, statistics[n]) for n in other):
        rank_zero_info(
            f"{source} keeps its own statistics ({shown}), whose ranges hold those of the data "
            f"({found}); take those of the data with --model.statistics data"
        )
        return
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


def fits(own: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether the statistics of a policy serve other data of, it seems, the same robot.

    In every dimension, the data are inside the policy's range, give or take a twentieth of it; and
    where they are not constant, they fill at least a fifth, so that not many values share a token.

    Args:
        own: of the policy.
        found: of the data.
    """
    low, high = _bounds(own)
    bottom, top = _bounds(found)
    if len(low) != len(bottom):
        return False
    width, filled = high - low, top - bottom
    inside = (bottom >= low - 0.05 * width) & (top <= high + 0.05 * width)
    return bool((inside & ((filled == 0) | (filled >= 0.2 * width))).all())


def normalizer(statistics: dict[str, Any], like: Normalizer) -> Normalizer:
    """A normalizer of other statistics that works like another one."""
    mask = like.to_dict()["mask"]
    if mask is not None and len(mask) != len(statistics["mean"]):
        mask = None
    return Normalizer(statistics, like.mode, mask, like.zero_constant)


def _bounds(statistics: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The range of each dimension, by the first statistics there are."""
    names = next((names for names in NEEDS.values() if {*names} <= statistics.keys() and names), ())
    low, high = (torch.tensor(statistics[name], dtype=torch.float64) for name in names)
    return (low - high, low + high) if names == NEEDS["zscore"] else (low, high)


def _range(statistics: dict[str, Any]) -> str:
    """The smallest and the largest value of all dimensions."""
    low, high = _bounds(statistics)
    return f"{low.min():.4g}..{high.max():.4g}"
