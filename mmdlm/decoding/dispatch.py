"""Dispatch of hooks to strategies."""

from __future__ import annotations

from collections.abc import Sequence as Items

from mmdlm.decoding.caches.exact import Exact
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.compatibility import check_together
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.greedy import Greedy
from mmdlm.decoding.scores.probability import Probability
from mmdlm.decoding.strategy import Strategy

Owners = dict[str, list[Strategy]]
"""Hook name to the strategies that decide it; under "all", every strategy of the decode once."""


def assign(strategies: Items[Strategy]) -> Owners:
    """Hook name to the strategies that decide it, with the loop's own defaults filled in.

    Raises:
        ValueError: two strategies decide the same one-owner hook, or one takes away what another
            one requires.
    """
    owners: Owners = {}
    for strategy in strategies:
        for hook in strategy.hooks():
            owners.setdefault(hook, []).append(strategy)
    for hook in Strategy.ONE_OWNER:
        if len(owners.get(hook, ())) > 1:
            a, b = (type(s).__name__ for s in owners[hook][:2])
            raise ValueError(f"{a} and {b} both decide {hook!r}; keep one")
    check_together(strategies)
    for default in (Blocks(), Exact(), Greedy(), Probability(), TopK()):
        for hook in default.hooks():
            owners.setdefault(hook, [default])
    everyone = [*strategies, *(s for held in owners.values() for s in held)]
    owners["all"] = list({id(s): s for s in everyone}.values())
    return owners
