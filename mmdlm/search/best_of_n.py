"""Best of n: decode a prompt several times and keep the answer with the highest score."""

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
from mmdlm.search.candidates import answer_ids, generators, select

Score = Callable[[list[int]], float]
"""Score of an answer's token ids up to its end token; higher is better."""


@dataclass(frozen=True)
class Candidates:
    """All candidates with their scores.

    Args:
        winner: index of the selected candidate of each row.
        seeds: seed of each candidate.
        scores: scores of the candidates, for each row.
        candidates: decodes.
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
    """Best of n: the answer with the highest score, selected for each batch row separately.

    Ties go to the earlier candidate.

    Args:
        model: model.
        prompt: see `mmdlm.decode`.
        length: positions G to fill.
        strategies: strategies of every decode, see `mmdlm.decode`; if temperature > 0, none of them
            may define `pick`.
        n: number of decodes if `seeds` is None.
        seeds: one seed per decode, used for every row; None: 0 to n - 1.
        temperature: temperature of `mmdlm.decoding.scores.gumbel.Gumbel`; 0 for strategies that
            sample themselves.
        score: score of an answer, higher is better; None: `mean_log_probability`.
        mask: see `mmdlm.decode`.
        canvas: see `mmdlm.decode`.
        columns: see `mmdlm.decode`.
    Returns:
        the best decode, with `nfe` summed over all decodes, and all candidates.
    Raises:
        ValueError: there is no candidate, a score is NaN, or see `mmdlm.decode`.
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
            generator=generators(model, prompt, seed),
            columns=columns,
            canvas=canvas,
        )
        for seed in seeds
    )
    scores = tuple(zip(*(_scores(model, c, score) for c in candidates), strict=True))
    if any(math.isnan(value) for row in scores for value in row):
        raise ValueError(f"a score is NaN, expected numbers; scores per row: {scores}")
    winner = tuple(max(range(len(row)), key=lambda i: (row[i], -i)) for row in scores)
    return select(model, candidates, winner), Candidates(winner, seeds, scores, candidates)


def mean_log_probability(model: MultimodalDLM, decoded: Decoded) -> list[float]:
    """Mean log probability of each row's answer in nats per token, at most 0.

    The probabilities are those at commit time. The mean is over generated tokens up to and
    including the first end token; later end tokens are nearly certain and are left out.

    Args:
        model: model, for its end token ids.
        decoded: finished decode.
    """
    means = []
    history = decoded.history
    steps, confidences = history.step.tolist(), history.confidence.double().tolist()
    for ids, step, row in zip(answer_ids(model, decoded), steps, confidences, strict=True):
        size = len(ids) + 1  # including the end token
        pairs = zip(step[:size], row[:size], strict=True)
        logs = [math.log(max(p, 1e-45)) for s, p in pairs if s >= 0]
        means.append(sum(logs) / len(logs) if logs else 0.0)
    return means


def _scores(model: MultimodalDLM, decoded: Decoded, score: Score | None) -> list[float]:
    """Score of each row."""
    if score is None:
        return mean_log_probability(model, decoded)
    return [float(score(ids)) for ids in answer_ids(model, decoded)]
