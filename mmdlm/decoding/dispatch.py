"""Which strategy decides what."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import permutations

from mmdlm.decoding.caches.exact import Exact
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.greedy import Greedy
from mmdlm.decoding.scores.probability import Probability
from mmdlm.decoding.strategy import Strategy

Owners = dict[str, list[Strategy]]
"""Hook name to the strategies that decide it; under "begin", all of the decode once."""


def assign(strategies: Items[Strategy]) -> Owners:
    """Hook name to the strategies that decide it, with the loop's own defaults filled in.

    Raises:
        ValueError: two strategies decide the same one-owner hook, or one excludes the other.
    """
    owners: Owners = {}
    for strategy in strategies:
        for hook in strategy.hooks():
            owners.setdefault(hook, []).append(strategy)
    for hook in Strategy.ONE_OWNER:
        if len(owners.get(hook, ())) > 1:
            a, b = (type(s).__name__ for s in owners[hook][:2])
            raise ValueError(f"{a} and {b} both decide {hook!r}; keep one")
    for one, other in permutations(strategies, 2):
        a, b = type(one).__name__, type(other).__name__
        if why := {b, *other.hooks()} & set(one.excludes):
            reason = "" if b in why else f", which decides {min(why)!r}"
            raise ValueError(f"{a} cannot be combined with {b}{reason}; keep one")
    for default in (Blocks(), Exact(), Greedy(), Probability(), TopK()):
        for hook in default.hooks():
            owners.setdefault(hook, [default])
    everyone = [*strategies, *(s for held in owners.values() for s in held)]
    owners["begin"] = list({id(s): s for s in everyone}.values())
    return owners
