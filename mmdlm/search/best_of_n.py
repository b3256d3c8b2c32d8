"""One prompt decoded several times, and the best answer of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from torch import Tensor

from mmdlm.decoding import preset
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM
from mmdlm.search.candidates import answers, chosen, sources

Score = Callable[[list[int]], float]
"""From the ids of an answer, up to its end, to how good it is; higher is better."""


@dataclass(frozen=True)
class Candidates:
    """What there was to choose from.

    Args:
        winner: for each row, which candidate was kept.
        seeds: of each candidate.
        scores: for each row, the score of each candidate.
        candidates: the decodes.
    """

    winner: tuple[int, ...]
    seeds: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    candidates: tuple[Decoded, ...]

    @property
    def nfe(self) -> int:
        """Forwards of all candidates together."""
        return sum(candidate.nfe for candidate in self.candidates)


def best_of_n(
    model: MultimodalDLM,
    prompt: Tensor | Sequence,
    length: int,
    strategies: preset.Choice = (),
    *,
    n: int = 4,
    seeds: Items[int] | None = None,
    temperature: float = 0.9,
    score: Score | None = None,
    mask: Tensor | None = None,
    canvas: Tensor | None = None,
    columns: slice | None = None,
) -> tuple[Decoded, Candidates]:
    """The answer with the highest score of several decodes, for every row of the batch alone.

    The first of equals is kept.

    Args:
        model: the model.
        prompt: see `mmdlm.decode`.
        length: positions G to fill.
        strategies: of every decode, see `mmdlm.decode`; with a temperature none that decides
            `pick`.
        n: number of decodes, where no seeds are given.
        seeds: one decode each, in which every row draws from a generator of this seed; None: 0 to
            n - 1.
        temperature: of `mmdlm.decoding.scores.gumbel.Gumbel`; 0 for strategies that draw
            themselves.
        score: of an answer, higher is better; None: `mean_log_probability`.
        mask: see `mmdlm.decode`.
        canvas: see `mmdlm.decode`.
        columns: see `mmdlm.decode`.
    Returns:
        the best decode, its forwards being those of all decodes, and all there was to choose from.
    Raises:
        ValueError: there is nothing to choose from, or a score is NaN; see also `mmdlm.decode`.
    """
    seeds = tuple(range(n)) if seeds is None else tuple(seeds)
    if not seeds:
        raise ValueError(f"n is {n} and seeds is {seeds}; expected at least one decode")
    shared = preset.strategies(strategies)
    candidates = tuple(
        decode(
            model,
            prompt,
            length,
            [*([Gumbel(temperature)] if temperature else []), *shared],
            mask=mask,
            generator=sources(model, prompt, seed),
            columns=columns,
            canvas=canvas,
        )
        for seed in seeds
    )
    scores = tuple(zip(*(_scores(model, c, score) for c in candidates), strict=True))
    if any(math.isnan(value) for row in scores for value in row):
        raise ValueError(f"a score is NaN (of the rows: {scores}); make `score` return a number")
    winner = tuple(max(range(len(row)), key=lambda i: (row[i], -i)) for row in scores)
    return chosen(model, candidates, winner), Candidates(winner, seeds, scores, candidates)


def mean_log_probability(model: MultimodalDLM, decoded: Decoded) -> list[float]:
    """How sure each row was of its answer, in nats per token, at most 0.

    The mean over what the decode filled, up to the first end token, of the log of the probability
    each token had when it was committed; what follows the end is easy and would dilute it.

    Args:
        model: says which tokens end an answer.
        decoded: a finished decode.
    """
    found = []
    steps, sure = decoded.history.step.tolist(), decoded.history.confidence.double().tolist()
    for ids, step, probability in zip(answers(model, decoded), steps, sure, strict=True):
        to = len(ids) + 1  # the end token is part of what was said
        logs = [
            math.log(max(p, 1e-45))
            for s, p in zip(step[:to], probability[:to], strict=True)
            if s >= 0
        ]
        found.append(sum(logs) / len(logs) if logs else 0.0)
    return found


def _scores(model: MultimodalDLM, decoded: Decoded, score: Score | None) -> list[float]:
    """The score of each row."""
    if score is None:
        return mean_log_probability(model, decoded)
    return [float(score(ids)) for ids in answers(model, decoded)]
