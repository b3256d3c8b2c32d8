"""Hierarchical trajectory search: many decodes begin, those with low scores end early."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from encoders.checks import AtLeast, Checked, PositiveInt
from mmdlm.decoding import preset
from mmdlm.decoding.session import Finished, Session
from mmdlm.decoding.state import Source
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM
from mmdlm.search.candidates import generators

Score = Callable[[Tensor], list[float]]
"""Scores of canvases [n G] int64, which may hold masks; higher is better."""


@dataclass(frozen=True)
class Branch(Checked):
    """Where trajectories that go on come from after a selection: from copies of the best ones.

    In a copy some tokens of low confidence are masked again; it has random numbers of its own.

    Source: see `hierarchical`.

    Args:
        survivors: trajectories that go on as they are and are copied, in turn.
        tokens: committed tokens that are masked again in each copy, chosen at random.
        pool: they are chosen among the `pool * tokens` of lowest confidence; 1 takes these
            themselves, infinite all that were committed.
    """

    survivors: PositiveInt = 2
    tokens: PositiveInt = 2
    pool: Annotated[float, AtLeast(1)] = 3.0

    def again(self, canvas: Tensor, confidence: Tensor, seed: int) -> Tensor:
        """[G] bool, the tokens of an answer that are masked again.

        Args:
            canvas: [G] int64 ids.
            confidence: [G] float32, 0 where nothing was committed.
            seed: of the choice.
        """
        committed = int((confidence > 0).sum())
        order = confidence.masked_fill(confidence <= 0, torch.inf).argsort(stable=True)
        pool = order[: int(min(committed, self.pool * self.tokens))]
        mixed = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        again = torch.zeros_like(canvas, dtype=torch.bool)
        again[pool[mixed[: self.tokens].to(pool.device)]] = True
        return again


@dataclass(frozen=True)
class Trajectories:
    """The answers of a search, best first.

    Args:
        answers: those that were decoded to the end.
        scores: score of each.
        seeds: seed of each; copies of other trajectories have n and more.
        alive: trajectories that took part in each step.
        scored: canvases that were scored.
        nfe: forwards of the backbone for all trajectories together, as they run in batches.
    """

    answers: tuple[Finished, ...]
    scores: tuple[float, ...]
    seeds: tuple[int, ...]
    alive: tuple[int, ...]
    scored: int
    nfe: int

    @property
    def tokens(self) -> Tensor:
        """[K G] int64, the answers."""
        return torch.stack([each.tokens for each in self.answers])

    @property
    def forwards(self) -> int:
        """Steps of all trajectories together: what decoding them one by one would take."""
        return sum(self.alive)


@torch.inference_mode()
def hierarchical(
    model: MultimodalDLM,
    prompt: Tensor | Sequence,
    length: int,
    strategies: preset.Choice,
    steps: int,
    score: Score,
    *,
    n: int = 16,
    keep: int = 4,
    decay: float = 1.8,
    window: tuple[float, float] = (0.1, 0.6),
    interval: int = 3,
    branch: Branch | None = None,
    seeded: Callable[[int], Source] | None = None,
    canvas: Tensor | None = None,
    columns: slice | None = None,
    alternatives: dict[str, Tensor | Sequence] | None = None,
) -> Trajectories:
    """The best of n decodes for about n + keep * steps steps instead of n * steps.

    All trajectories run in one batch and differ by their seeds 0 to n - 1. At step s of the window
    max(keep, ceil(n decay ** (start - s))) of them stay, those with the highest scores; after a
    selection the next one is `interval` + 1 steps later. Those that finish are scored again. With
    `branch` as many stay, but all except the best are replaced by copies of these.

    Source: viiika/Prism: LLaDA/LLaDA_Prism/dllm_eval/models/hts_sampler.py (arXiv 2602.01842).

    Args:
        model: the model.
        prompt: token ids [1 P] or a Sequence of one row.
        length: positions to fill.
        strategies: of every decode, with random draws; see `mmdlm.decode`.
        steps: steps of one decode, which the window refers to.
        score: see `Score`, such as `verifier`.
        n: trajectories.
        keep: how many of them are decoded to the end.
        decay: base of the number that stays, above 1.
        window: first and last step of selections, as shares of `steps`.
        interval: steps between two selections.
        branch: copies in place of the trajectories with middle scores; None for none.
        seeded: random stream of a seed; None: a generator of the seed, as in `best_of_n`.
        canvas: [1 G], see `mmdlm.decode`.
        columns: see `mmdlm.decode`.
        alternatives: see `mmdlm.decode`, of one row each.
    Raises:
        ValueError: n, keep or decay are out of range, or see `mmdlm.decode`.
    """
    if not 1 <= keep <= n or decay <= 1:
        raise ValueError(f"n {n}, keep {keep}, decay {decay}: expected 1 <= keep <= n, decay > 1")
    stream = seeded or (lambda seed: generators(model, prompt, seed))
    session = Session(model, strategies, columns=columns)
    given = {"canvas": canvas, "alternatives": alternatives}
    keys = [session.add_rows(prompt, length, generator=stream(i), **given)[0] for i in range(n)]
    search = _Search(session, score, stream, {key: seed for seed, key in enumerate(keys)})
    start, stop = (int(share * steps) for share in window)
    alive, ready = [], start
    while session.keys:
        now = len(alive)
        most = max(keep, math.ceil(n * decay ** (start - now)))
        if ready <= now <= stop and len(session.keys) > most:
            search.select(most, branch)
            ready = now + interval + 1
        alive.append(len(session.keys))
        search.step()
    return search.result(alive)


@dataclass
class _Search:
    """The trajectories of a search.

    Args:
        session: those that run.
        score: see `Score`.
        stream: random stream of a seed.
        seeds: seed of each trajectory, by key.
        found: those that are complete, by key.
        scored: canvases that were scored.
    """

    session: Session
    score: Score
    stream: Callable[[int], Source]
    seeds: dict[int, int]
    found: dict[int, Finished] = field(default_factory=dict)
    scored: int = 0

    def step(self) -> None:
        """One step of all trajectories."""
        self.found |= {e.key: e for e in self.session.step() if isinstance(e, Finished)}

    def ranked(self, canvases: dict[int, Tensor]) -> list[tuple[int, float]]:
        """Keys and scores of canvases, best first."""
        values = self.score(torch.stack(list(canvases.values())))
        self.scored += len(values)
        return sorted(zip(canvases, values, strict=True), key=lambda pair: -pair[1])

    def select(self, most: int, branch: Branch | None) -> None:
        """Leaves `most` trajectories: the best, and copies of them."""
        session = self.session
        best = [key for key, _ in self.ranked({key: session.canvas(key) for key in session.keys})]
        stay = most if branch is None else min(branch.survivors, most)
        for key in best[stay:]:
            session.remove(key)
        for i in range(most - stay):
            key, seed = best[i % stay], len(self.seeds)
            again = branch.again(session.canvas(key), session.confidence(key), seed)
            self.seeds[session.fork(key, generator=self.stream(seed), again=again)] = seed

    def result(self, alive: list[int]) -> Trajectories:
        """All that are complete."""
        ranked = self.ranked({key: each.tokens for key, each in self.found.items()})
        return Trajectories(
            tuple(self.found[key] for key, _ in ranked),
            tuple(value for _, value in ranked),
            tuple(self.seeds[key] for key, _ in ranked),
            tuple(alive),
            self.scored,
            self.session.calls,
        )


def verifier(
    model: MultimodalDLM,
    ask: Callable[[Tensor], Tensor],
    yes: Items[int],
    no: Items[int],
) -> Score:
    """A score by the model itself: the probability of "yes" against "no" to a question, in [0, 1].

    One forward per canvas: the highest logit among the ids of each answer at one masked position
    after the question. Source: see `hierarchical` (verifier.py).

    Args:
        model: the judge.
        ask: question [P] int64 about a canvas [G], such as "Is this answer right? Yes or No."
        yes: ids of the answer yes, in its spellings.
        no: ids of the answer no.
    """
    choices = [torch.tensor(list(ids)) for ids in (yes, no)]

    def score(canvases: Tensor) -> list[float]:
        found = []
        for canvas in canvases:
            mask = torch.full((1,), model.spec.mask_id)
            ids = torch.cat([ask(canvas.cpu()), mask])[None].to(model.device)
            logits = model.logits(ids)[0, -1]
            both = torch.stack([logits[each.to(logits.device)].max() for each in choices])
            found.append(float(both.softmax(0)[0]))
        return found

    return score
