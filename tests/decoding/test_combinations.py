"""Every pair of strategies: rejected with a reason, or correct."""

from collections.abc import Callable
from itertools import combinations

import pytest
import torch

from mmdlm import discover
from mmdlm.decoding.decode import decode
from mmdlm.decoding.loop import assign
from mmdlm.decoding.strategy import BY_HOOK, Strategy
from mmdlm.model import MultimodalDLM

LENGTH, MASK = 6, 2
STRATEGIES = discover.classes("mmdlm.decoding", Strategy)
Toy = Callable[..., MultimodalDLM]


def is_legal(a: type[Strategy], b: type[Strategy]) -> bool:
    """Whether both can be used: no hook has two owners, neither lacks what the other requires."""
    both = set(a.hooks()) & set(b.hooks()) & set(Strategy.ONE_OWNER)
    lacks = [
        one.denies
        | {BY_HOOK.get(hook) for hook in one.hooks()}
        | ({"plain_cache"} if one.cache is not Strategy.cache else set())
        for one in (a, b)
    ]
    return not both and not a.requires & lacks[1] and not b.requires & lacks[0]


def alone(row: torch.Tensor) -> list[int]:
    """What a row holds before the end tokens that make it as long as others."""
    tokens = row.tolist()
    while tokens and tokens[-1] == 1:
        tokens.pop()
    return tokens


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_with_every_other(name: str, toy: Toy, prompts, seeds) -> None:
    models, (tokens, mask) = (toy(), toy(shift=True)), prompts(5, 3)
    others = [other for a, other in combinations(STRATEGIES, 2) if a == name]
    for i, other in enumerate(others):
        model = models[i % 2]
        pair = [STRATEGIES[name](), STRATEGIES[other]()]
        if not is_legal(*(STRATEGIES[n] for n in (name, other))):
            with pytest.raises(ValueError, match="both decide|cannot be combined"):
                assign(pair)
            continue
        got = decode(model, tokens, LENGTH, pair, mask=mask, generator=seeds(0, 1))
        said = f"{name} with {other}"
        assert got.tokens[:, :5].equal(tokens), said
        assert not (got.tokens[:, 5:] == MASK).any(), said
        forwards = 2 if "CFG" in (name, other) else 1
        assert max(got.forwards) <= forwards * 6 * LENGTH, said
        if "ODD" in (name, other):
            continue  # the rows of its batch are meant to look at each other
        one = decode(model, tokens[1:, 2:], LENGTH, pair, generator=seeds(1))
        assert alone(got.tokens[1, 5:]) == alone(one.tokens[0, 3:]), said
        assert got.forwards[1] == one.nfe, said
