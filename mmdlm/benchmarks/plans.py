"""Driving plans against recorded ones: critical objects, behaviors, distance of the waypoints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmdlm.atomic import write_text
from mmdlm.data.formats import open_data
from mmdlm.tasks.drive import OBJECTS, Plan, plan


@dataclass(frozen=True)
class Agreement:
    """How well plans agree with recorded ones; shares in [0, 1], distances in metres.

    Args:
        rows: number of plans.
        objects: share of right yes/no slots.
        objects_constant: the share that the most frequent answer of each slot would get.
        roc: area under the ROC curve of the probability of "yes", the mean over the slots that hold
            both answers; None if there is no such slot.
        longitudinal: share of right longitudinal behaviors.
        longitudinal_constant: the share of the most frequent one.
        lateral: share of right lateral behaviors.
        lateral_constant: the share of the most frequent one.
        distance: mean L2 distance of the waypoints (ADE).
        distance_constant: that of the mean recorded trajectory.
        last: mean distance of the last waypoint (FDE).
    """

    rows: int
    objects: float
    objects_constant: float
    roc: float | None
    longitudinal: float
    longitudinal_constant: float
    lateral: float
    lateral_constant: float
    distance: float
    distance_constant: float
    last: float

    def __str__(self) -> str:
        roc = "" if self.roc is None else f", area under the ROC curve {self.roc:.3f}"
        lines = [
            f"{self.rows} plans (in brackets: always the most frequent answer)",
            f"critical objects: {self.objects:.1%} ({self.objects_constant:.1%}){roc}",
            f"longitudinal behavior: {self.longitudinal:.1%} ({self.longitudinal_constant:.1%})",
            f"lateral behavior: {self.lateral:.1%} ({self.lateral_constant:.1%})",
            f"waypoints: {self.distance:.2f} m off on average (mean trajectory "
            f"{self.distance_constant:.2f} m), the last one {self.last:.2f} m",
        ]
        return "\n".join(lines)


def agreement(plans: Items[Plan], recorded: Items[dict[str, Any]]) -> Agreement:
    """Agreement of plans with recorded ones.

    Args:
        plans: at least one.
        recorded: the right plan of each, see `mmdlm.tasks.drive.SCHEMA`.
    """
    planned = [one.value for one in plans]
    objects, constant, areas = [], [], []
    for name in OBJECTS:
        right = [one["critical_objects"][name] for one in recorded]
        found = [one["critical_objects"][name] for one in planned]
        objects.append(_same(found, right))
        constant.append(_most(right))
        is_yes = np.array([answer == "yes" for answer in right])
        if 0 < is_yes.sum() < len(right):
            areas.append(_roc(np.array([one.yes[name] for one in plans]), is_yes))
    behaviors = {}
    for name in ("longitudinal", "lateral"):
        right = [one["future_meta_behavior"][name] for one in recorded]
        found = [one["future_meta_behavior"][name] for one in planned]
        behaviors |= {name: _same(found, right), f"{name}_constant": _most(right)}
    points = np.array([one["trajectory"] for one in recorded])
    away = np.linalg.norm(np.array([one["trajectory"] for one in planned]) - points, axis=-1)
    mean = np.linalg.norm(points.mean(0) - points, axis=-1)
    return Agreement(
        rows=len(plans),
        objects=float(np.mean(objects)),
        objects_constant=float(np.mean(constant)),
        roc=float(np.mean(areas)) if areas else None,
        **behaviors,
        distance=float(away.mean()),
        distance_constant=float(mean.mean()),
        last=float(away[:, -1].mean()),
    )


def _same(found: Items[str], right: Items[str]) -> float:
    return float(np.mean([a == b for a, b in zip(found, right, strict=True)]))


def _most(right: Items[str]) -> float:
    """Share of the most frequent answer."""
    return max(Counter(right).values()) / len(right)


def _roc(scores: np.ndarray, is_yes: np.ndarray) -> float:
    """Probability that a random "yes" has a higher score than a random "no"; ties count half."""
    higher = scores[is_yes][:, None] - scores[~is_yes]
    return float(((higher > 0) + 0.5 * (higher == 0)).mean())


def bench_plans(
    data: Path,
    model: str,
    rows: int = 500,
    decoding: str | None = None,
    batch_size: int = 32,
    out: Path | None = None,
    device: str = "auto",
) -> int:
    """Compare driving plans with recorded ones, without a simulator.

    mmdlm bench plans data/driving/val.json --model ./my-driver

    Args:
        data: train.json or val.json of mmdlm data make driving.
        model: folder or hub id of a model trained by configs/train/driving.yaml.
        rows: rows at most, spread over the data.
        decoding: decoding preset; by default the most confident tokens first, in 8 forwards.
        batch_size: plans per batch.
        out: JSON file for the result.
        device: "auto", "cpu", "cuda".
    """
    from mmdlm.checkpoint import load

    if rows < 1:
        raise ValueError(f"rows is {rows}, expected at least 1")
    loaded, found = load(model, device=device), open_data(data)
    places = np.unique(np.linspace(0, len(found) - 1, rows).astype(int))
    samples = [found.sample(int(i), np.random.default_rng(0)) for i in places]
    scenes = []
    for sample in samples:
        asked = sample.conversations[0][0]
        images = [part.item for part in asked.parts if getattr(part, "kind", "") == "image"]
        scenes.append((images, asked.text))
    plans = plan(loaded, scenes, strategies=decoding, batch_size=batch_size)
    result = agreement(plans, [json.loads(sample.turns[0].answer) for sample in samples])
    print(result)
    if out is not None:
        settings = {"data": str(data), "model": model, "decoding": decoding}
        write_text(out, json.dumps(settings | asdict(result), indent=2) + "\n")
    return 0
