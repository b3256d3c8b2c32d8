"""Driving: a scene in, a plan out, as a JSON scaffold of which only the values are generated.

Three images (left, centre, right) and the history of the ego vehicle as text are the prompt. The
answer has yes/no slots of critical objects, an explanation, the next behaviour and a trajectory.

Source: SaFo-Lab/dVLM-AD (arXiv 2512.04459), where also only the masks of the values are written.
Its twelve critical objects, of which highway-env has vehicles only, are replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.preset import Choice
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import Answer
from mmdlm.tasks.infill import infill
from mmdlm.tasks.scaffold import scaffold

CAMERAS = ("left", "image", "right")
OBJECTS = ("front_vehicle", "left_vehicle", "right_vehicle", "rear_vehicle", "conflicting_vehicle")
LONGITUDINAL = {"accelerate": 1.5, "cruise": 0.0, "decelerate": -1.5, "brake": -4.5}
"""Behaviors, and the acceleration in m/s2 that stands for each when a car follows them."""
LATERAL = {"left": -1, "straight": 0, "right": 1}
Follow = Literal["behavior", "trajectory"]
STEPS = 8  # forwards of a plan; a single one mixes digits of different numbers
SECONDS = 5  # waypoints of the trajectory, one per second
REASONS = {
    ("accelerate", True): "the lane is free, speed up",
    ("accelerate", False): "close up to the vehicle ahead",
    ("cruise", True): "the lane is free, keep the speed",
    ("cruise", False): "follow the vehicle ahead",
    ("decelerate", True): "slow down early for the vehicle ahead",
    ("decelerate", False): "slow down for the vehicle ahead",
    ("brake", True): "brake early for the vehicle ahead",
    ("brake", False): "brake for the vehicle ahead",
}
"""Explanations in training data, by behavior and whether no vehicle is in front."""
FASTER = "; the {} lane is faster"
"""What is added for a change to the left or right lane."""
_EXAMPLES = [
    reason + more
    for reason in REASONS.values()
    for more in ("", FASTER.format("left"), FASTER.format("right"))
]
_NUMBER = {"type": "number", "x-tokens": 5}
_WAYPOINT = {"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "critical_objects": {
            "type": "object",
            "properties": {name: {"enum": ["yes", "no"]} for name in OBJECTS},
        },
        "explanation": {"type": "string", "x-tokens": 16, "examples": _EXAMPLES},
        "future_meta_behavior": {
            "type": "object",
            "properties": {
                "longitudinal": {"enum": list(LONGITUDINAL)},
                "lateral": {"enum": list(LATERAL)},
            },
        },
        "trajectory": {
            "type": "array",
            "items": _WAYPOINT,
            "minItems": SECONDS,
            "maxItems": SECONDS,
        },
    },
}
"""The answer. Waypoints are metres ahead of and to the right of the ego vehicle, one per second."""


@dataclass(frozen=True)
class Plan:
    """An answer of a driving model.

    Args:
        value: see `SCHEMA`.
        yes: probability of "yes" of each critical object when its slot was committed.
        answer: text and decoding statistics.
    """

    value: dict[str, Any]
    yes: dict[str, float]
    answer: Answer

    @property
    def lane(self) -> int:
        """-1 for a change to the left lane, 1 to the right, 0 for none."""
        return LATERAL[self.value["future_meta_behavior"]["lateral"]]

    def acceleration(self, speed: float) -> float:
        """Constant acceleration that reaches the first three waypoints, in m/s2.

        It is the median of the three values, so that one wrong digit has no effect.

        Args:
            speed: current speed in m/s.
        """
        ahead = [point[0] for point in self.value["trajectory"][:3]]
        each = [2 * (x - speed * t) / t**2 for t, x in enumerate(ahead, 1)]
        return float(np.median(each))

    def action(self, speed: float, follow: Follow = "behavior") -> np.ndarray:
        """Action of `mmdlm.simulators.highway.Highway`, float32 [2].

        Args:
            speed: current speed in m/s.
            follow: "behavior": the acceleration of the longitudinal behavior. "trajectory": that of
                the waypoints.
        """
        longitudinal = LONGITUDINAL[self.value["future_meta_behavior"]["longitudinal"]]
        chosen = longitudinal if follow == "behavior" else self.acceleration(speed)
        return np.array([chosen, self.lane], np.float32)


def prompt(history: Iterable[tuple[float, float, float, float]], step: float = 0.5) -> str:
    """Text of a scene: the command and the history of the ego vehicle.

    Args:
        history: (metres ahead, metres to the right, m/s, m/s2), the last entry is now.
        step: seconds from one entry to the next.
    """
    states = list(history)
    lines = [
        f"t-{step * (len(states) - i):.1f} [{round(x)}, {_plain(y)}] v {v:.1f} a {_plain(a)}"
        for i, (x, y, v, a) in enumerate(states, 1)
    ]
    return "\n".join(["Drive the yellow car. Command: go straight.", *lines, "Output:"])


def _plain(value: float) -> str:
    """One decimal, and no negative zero."""
    return f"{round(value, 1) + 0.0:.1f}"


def plan(
    model: MultimodalDLM,
    scenes: Items[tuple[Items[Any], str]],
    *,
    strategies: Choice = None,
    batch_size: int = 32,
    seed: int | None = None,
) -> list[Plan]:
    """Plans of several scenes, decoded in batches.

    Args:
        model: trained by `configs/train/driving.yaml`, or any model with a text vocabulary.
        scenes: (images from left to right, text of `prompt`) of each scene.
        strategies: preset name or list, see `mmdlm.decode`; None: the most confident tokens first,
            in `STEPS` forwards.
        batch_size: scenes per batch.
        seed: see `mmdlm.infill`.
    """
    answers = infill(
        model,
        SCHEMA,
        images=[list(images) for images, _ in scenes],
        prompt=[text for _, text in scenes],
        strategies=[TopK(steps=STEPS)] if strategies is None else strategies,
        batch_size=batch_size,
        details=True,
        seed=seed,
        fence=False,
    )
    slots = scaffold(model, SCHEMA, fence=False).slots[: len(OBJECTS)]
    plans = []
    for answer in answers:
        value, yes = json.loads(answer.text), {}
        for name, slot in zip(OBJECTS, slots, strict=True):
            probability = min(answer.confidence[slot.start : slot.stop])
            is_yes = value["critical_objects"][name] == "yes"
            yes[name] = probability if is_yes else 1 - probability
        plans.append(Plan(value, yes, answer))
    return plans
