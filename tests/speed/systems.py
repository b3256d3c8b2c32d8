"""The compared systems: our decode and the plain sampler, with equal weights and prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.caches.prompt_once import PromptOnce
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.strategy import Strategy
from mmdlm.model import MultimodalDLM
from tests.speed import plain
from tests.speed.shapes import Shape, padded, prompts

OURS, PLAIN = "mmdlm", "plain"
APPROXIMATE = {"prompt-once": "prefix"}
"""Modes whose tokens may differ, and the exact mode they are compared with."""
MODES = {
    "none": "every row in every step",
    "prefix": "all rows per block",
    "dual": "all rows per block",
    "prefix-lm": "prompt never",
    "prompt-once": "answer per block, prompt never",
}
"""Modes, and when keys and values are recomputed."""


@dataclass(frozen=True)
class Answer:
    """Result of one run.

    Args:
        tokens: the answer of each row.
        forwards: backbone forwards; rows decoded separately add up.
    """

    tokens: list[list[int]]
    forwards: int


Run = Callable[[], Answer]


def check_modes(modes: list[str]) -> list[str]:
    """Checks that all modes are known, and returns them.

    Raises:
        ValueError: one is not.
    """
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"there is no mode {mode!r}; known: {', '.join(MODES)}")
    if not modes:
        raise ValueError(f"no mode is named; known: {', '.join(MODES)}")
    return modes


def strategies(shape: Shape, mode: str) -> list[Strategy]:
    """Our strategies for a mode."""
    select: Strategy = TopK(shape.steps) if shape.threshold is None else Threshold(shape.threshold)
    caches: dict[str, list[Strategy]] = {
        **{"none": [], "prefix": [PrefixCache()], "dual": [DualCache()]},
        **{"prefix-lm": [PrefixLM()], "prompt-once": [PromptOnce()]},
    }
    return [*caches[mode], Blocks(shape.block), select]


def runner(system: str, model: MultimodalDLM, shape: Shape, mode: str, seed: int = 0) -> Run:
    """Returns a function that decodes the prompts of a shape once.

    The published samplers decode one row at a time, so the plain one loops over the batch.

    Args:
        system: `OURS` or `PLAIN`; for an approximate mode, the plain one runs the exact mode.
        model: result of `shapes.synthetic`.
        shape: the shape.
        mode: see `MODES`.
        seed: seed of the prompts.
    """
    rows = prompts(shape, seed, model.device)
    if system == PLAIN:
        sampler, exact = plain.Plain(model), APPROXIMATE.get(mode, mode)

        def run_plain() -> Answer:
            found = [sampler.decode(row, exact, shape.schedule) for row in rows]
            tokens = [one.tokens[0, -shape.length :].tolist() for one in found]
            return Answer(tokens, sum(one.forwards for one in found))

        return run_plain
    tokens, mask = padded(rows, model.spec.pad_id)
    chosen = strategies(shape, mode)

    def run_ours() -> Answer:
        found = decode(model, tokens, shape.length, chosen, mask=mask, columns=shape.columns)
        return Answer(found.tokens[:, -shape.length :].tolist(), found.nfe)

    return run_ours


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of equal tokens."""
    pairs = [pair for rows in zip(ours, theirs, strict=True) for pair in zip(*rows, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def passes(shape: Shape, dtype: str, ours: Answer, theirs: Answer) -> bool:
    """The gate: equal tokens in at most as many forwards.

    In 16 bits, near-ties may differ: the first block must be equal, and 99 % overall.
    """
    if ours.forwards > theirs.forwards:
        return False
    if dtype == str(torch.float32).removeprefix("torch."):
        return ours.tokens == theirs.tokens
    first = [[row[: shape.block] for row in one.tokens] for one in (ours, theirs)]
    return first[0] == first[1] and agreement(ours.tokens, theirs.tokens) >= 0.99
