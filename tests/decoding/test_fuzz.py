"""Random combinations of strategies and settings: rejected with a reason, or correct."""

import random
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mmdlm import discover
from mmdlm.decoding.caches.exact import Exact
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.loop import assign
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.state import State
from mmdlm.decoding.strategy import Strategy
from mmdlm.layout import Row
from mmdlm.model import MultimodalDLM

EOS, MASK = 1, 2
STRATEGIES = discover.classes("mmdlm.decoding", Strategy)
MODELS = (
    {},
    {"shift": True},
    {"attention": "prefix"},
    {"attention": "prefix", "block_size": 3, "shift": True},
    {"attention": "cascade", "block_size": 4},
    {"attention": "block_causal", "block_size": 4},
    {"attention": "block_causal", "block_size": 1, "shift": True},
)
SHARE, BAR = (0.0, 0.1, 0.3, 0.8, 1.0), (0.0, 0.1, 0.3, 1.5)
# Drawn for every strategy that has a setting of this name; the others keep their defaults.
SETTINGS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("size", "window", "block", "every", "track"), (1, 2, 3, 5)),
    **dict.fromkeys(("before", "after", "warmup", "passes", "enough", "explore"), (0, 1, 3)),
    **dict.fromkeys(("steps", "steps_per_block"), (1, 3, 9)),
    **dict.fromkeys(("tau", "relaxed"), BAR),
    **dict.fromkeys(("remask", "expand_until", "repair_threshold", "share", "eos_share"), SHARE),
    **dict.fromkeys(("prefill", "dual", "dynamic", "eos"), (False, True)),
    **dict.fromkeys(("temperature", "scale"), (0.5, 1.5)),
    **dict.fromkeys(("expansion", "radius", "check"), (1, 4)),
    "threshold": (0.05, 2.0),
    "delimiters": ((), (5, 9, 14, 21, 33, 40)),
    "gamma": (0.5, 0.9, 2.0),
    "growth": (1.0, 2.0),
    "low": (0.0, 0.05),
    "high": (0.1, 0.9),
    "top_k": (None, 3),
    "count": (1, 3),
    "variant": ("un", "un_right"),
}
# What a model, a layout or another setting does not allow.
REFUSALS = "requires (full attention|an answer that can be filled)|no possible token"


class Case(NamedTuple):
    """One decode: a canvas [B G] after the prompts of rows of unequal length."""

    model: MultimodalDLM
    rows: list[Row]
    canvas: Tensor
    columns: slice | None
    strategies: list[Strategy]

    def run(self, seeds: Callable, *numbers: int) -> Decoded:
        """The chosen rows decoded, each with the random draws it has in every batch."""
        return decode(
            self.model,
            self.model.arrange([self.rows[i] for i in numbers]),
            self.canvas.shape[1],
            self.strategies,
            generator=seeds(*numbers),
            columns=self.columns,
            canvas=self.canvas[list(numbers)],
        )


def combination(draw: random.Random) -> list[Strategy]:
    """Up to five strategies that the loop takes together."""
    chosen: list[Strategy] = []
    count = draw.randint(2, 5)
    for name in draw.sample(list(STRATEGIES), len(STRATEGIES)):
        kind = STRATEGIES[name]
        settings = {k: draw.choice(SETTINGS[k]) for k in kind.__dataclass_fields__ if k in SETTINGS}
        with suppress(ValueError):
            assign([*chosen, kind(**settings)])
            chosen.append(kind(**settings))
        if len(chosen) == count:
            break
    return chosen


def case(seed: int, toy: Callable[..., MultimodalDLM]) -> Case:
    """A random decode; some with given tokens, media or columns."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(draw.randint(1, 4)):
        media = torch.randn(draw.randint(1, 4), 32, generator=generator).double()
        text = torch.randint(MASK, 50, (draw.randint(1, 8),), generator=generator)
        rows.append(Row((media, text) if draw.random() < 0.3 else (text,)))
    canvas = torch.full((len(rows), draw.randint(1, 12)), MASK)
    if draw.random() < 0.5:
        given = torch.rand(canvas.shape, generator=generator) < draw.choice((0.1, 0.7))
        tokens = torch.randint(3, 50, canvas.shape, generator=generator)
        canvas = torch.where(given, tokens, canvas)
    columns = slice(10, 45) if draw.random() < 0.2 else None
    return Case(toy(**draw.choice(MODELS)), rows, canvas, columns, combination(draw))


def check(case: Case, got: Decoded, calls: int) -> None:
    """What holds for every decode."""
    prompt = case.model.arrange(case.rows).tokens
    answer, (steps, sure) = got.tokens[:, prompt.shape[1] :], vars(got.history).values()
    assert got.tokens[:, : prompt.shape[1]].equal(prompt)
    assert not (answer == MASK).any()
    assert got.nfe == calls
    assert ((sure > 0) == (steps >= 0)).all()
    assert (steps < max(*got.forwards, 1)).all()
    if case.columns is not None:
        written = answer[steps >= 0]
        assert ((written >= case.columns.start) & (written < case.columns.stop)).all()
    given = case.canvas != MASK
    for had, has, step, known in zip(case.canvas, answer, steps, given, strict=True):
        kept = iter(has[step < 0].tolist())
        assert all(token in kept for token in had[known].tolist())  # in this order
    if not any("resize" in s.hooks() for s in case.strategies):
        assert answer[given].equal(case.canvas[given])
        assert (steps[given] == -1).all()


@pytest.mark.filterwarnings("ignore:AdaBlock")
@pytest.mark.parametrize("number", range(100))
def test_a_random_combination(number: int, exact_toy, seeds, monkeypatch) -> None:
    calls: list[int] = []
    inner = MultimodalDLM.run

    def run(*given: Any) -> Tensor:
        calls.append(1)
        return inner(*given)

    monkeypatch.setattr(MultimodalDLM, "run", run)
    for seed in range(100 * number, 100 * number + 20):
        each = case(seed, exact_toy)
        calls.clear()
        try:
            got = each.run(seeds, *range(len(each.rows)))
            break
        except ValueError as error:
            why = str(error)
        assert re.search(REFUSALS, why), each.strategies
    check(each, got, len(calls))
    with monkeypatch.context() as patch:
        patch.setattr(State, "score_masked_only", False)  # whole blocks are scored, as on a GPU
        whole = each.run(seeds, *range(len(each.rows)))
    assert whole.tokens.equal(got.tokens), each.strategies
    assert whole.history.step.equal(got.history.step), each.strategies
    assert whole.nfe == got.nfe
    hooks = {hook for s in each.strategies for hook in s.hooks()}
    names = {type(s).__name__ for s in each.strategies}
    sees_answer = any(s.sees == "answer" for s in each.strategies)
    if "refresh" not in hooks and (each.model.spec.attention == "full" or not sees_answer):
        with monkeypatch.context() as patch:
            patch.setattr(
                Exact, "refresh", lambda self, view: Refresh(view.level >= 0, cached=False)
            )
            renewed = each.run(seeds, *range(len(each.rows)))
        assert renewed.tokens.equal(got.tokens), each.strategies
        assert renewed.history.step.equal(got.history.step), each.strategies
    if "ODD" in names:
        return
    size = got.tokens.shape[1] - got.history.step.shape[1]
    for i in range(len(each.rows)):
        alone = each.run(seeds, i)
        count = alone.history.step.shape[1]  # others of the batch may have grown longer
        answer, steps = got.tokens[i, size:], got.history.step[i]
        assert answer[:count].equal(alone.tokens[0, -count:]), each.strategies
        assert (answer[count:] == EOS).all()
        assert steps[:count].equal(alone.history.step[0]), each.strategies
        assert got.forwards[i] == alone.nfe, each.strategies
