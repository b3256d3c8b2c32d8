"""Checks that strategies are compatible with the model and with one another."""

from __future__ import annotations

from collections.abc import Sequence as Items

from mmdlm.decoding.strategy import Strategy
from mmdlm.model import MultimodalDLM

PROPERTIES = {
    "full_attention": "full attention",
    "any_order": "an answer that can be filled in any order",
    "all_scored": "all positions of the answer scored in each step",
    "fixed_length": "an answer whose length stays",
    "final_tokens": "committed tokens that do not change",
    "own_schedule": "a schedule that no early exit cuts short",
    "one_forward": "one forward per step",
}
"""Name of each property and what it means; see `Strategy.requires` and `Strategy.denies`."""

BY_HOOK = {"edit": "final_tokens", "resize": "fixed_length", "stop": "own_schedule"}
"""Properties that a decode lacks when a strategy decides the hook."""


def denied(strategy: Strategy | type[Strategy]) -> frozenset[str]:
    """Names of the properties that a decode with the strategy lacks."""
    return strategy.denies | {BY_HOOK[hook] for hook in strategy.hooks() if hook in BY_HOOK}


def check_together(strategies: Items[Strategy]) -> None:
    """Checks that no strategy takes away what another one requires.

    Raises:
        ValueError: one does.
    """
    for one in strategies:
        for other in strategies:
            missing = one.requires & denied(other) if one is not other else ()
            for name in sorted(missing):
                a, b = type(one).__name__, type(other).__name__
                raise ValueError(
                    f"{a} cannot be combined with {b}: {a} requires {PROPERTIES[name]}, which {b} "
                    "rules out; keep one"
                )


def check_model(strategy: Strategy, model: MultimodalDLM) -> None:
    """Checks that the model's attention offers what a strategy requires.

    Raises:
        ValueError: it does not.
    """
    spec = model.spec
    lacks = {"full_attention"} if spec.attention != "full" else set()
    if spec.attention == "block_causal" or (spec.attention == "cascade" and spec.block_size):
        lacks.add("any_order")
    if spec.attention == "prefix" and spec.block_size:
        lacks.add("any_order")
    for name in sorted(strategy.requires & lacks):
        detail = f" in blocks of {spec.block_size}" if name == "any_order" else ""
        raise ValueError(
            f"{type(strategy).__name__} requires {PROPERTIES[name]}, but this model has "
            f"{spec.attention} attention{detail}; leave {type(strategy).__name__} out"
        )
