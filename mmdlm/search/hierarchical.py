"""Hierarchical trajectory search: many decodes begin, those with low scores end early."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.decoding import preset
from mmdlm.decoding.session import Finished, Session
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM
from mmdlm.search.candidates import generators

Score = Callable[[Tensor], list[float]]
"""Scores of canvases [n G] int64, which may hold masks; higher is better."""


@dataclass(frozen=True)
class Trajectories:
    """The answers of a search, best first.

    Args:
        tokens: [K G] int64, answers that were decoded to the end.
        scores: score of each.
        seeds: seed of each.
        alive: trajectories that took part in each step.
        scored: canvases that were scored.
    """

    tokens: Tensor
    scores: tuple[float, ...]
    seeds: tuple[int, ...]
    alive: tuple[int, ...]
    scored: int

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
    canvas: Tensor | None = None,
    columns: slice | None = None,
    alternatives: dict[str, Tensor | Sequence] | None = None,
) -> Trajectories:
    """The best of n decodes for about n + keep * steps steps instead of n * steps.

    All trajectories run in one batch and differ by their seeds 0 to n - 1. At step s of the window
    max(keep, ceil(n decay ** (start - s))) of them stay, those with the highest scores; after a
    selection the next one is `interval` + 1 steps later. Those that finish are scored again.
    Prism also branches survivors by masking some of their tokens again; this does not.

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
        canvas: [1 G], see `mmdlm.decode`.
        columns: see `mmdlm.decode`.
        alternatives: see `mmdlm.decode`, of one row each.
    Raises:
        ValueError: n, keep or decay are out of range, or see `mmdlm.decode`.
    """
    if not 1 <= keep <= n or decay <= 1:
        raise ValueError(f"n {n}, keep {keep}, decay {decay}: expected 1 <= keep <= n, decay > 1")
    session, key_seed = Session(model, strategies, columns=columns), {}
    for seed in range(n):
        (key,) = session.add_rows(
            prompt,
            length,
            generator=generators(model, prompt, seed),
            canvas=canvas,
            alternatives=alternatives,
        )
        key_seed[key] = seed
    start, stop = (int(share * steps) for share in window)
    found: dict[int, Tensor] = {}
    alive, scored, ready = [], 0, start
    while session.keys:
        now = len(alive)
        left = session.keys
        most = max(keep, math.ceil(n * decay ** (start - now)))
        if ready <= now <= stop and len(left) > most:
            values = score(torch.stack([session.canvas(key) for key in left]))
            scored += len(left)
            ranked = sorted(range(len(left)), key=lambda i: -values[i])
            for i in ranked[most:]:
                session.remove(left[i])
            ready = now + interval + 1
        alive.append(len(session.keys))
        found |= {e.key: e.tokens for e in session.step() if isinstance(e, Finished)}
    keys = list(found)
    values = score(torch.stack([found[key] for key in keys]))
    order = sorted(range(len(keys)), key=lambda i: -values[i])
    return Trajectories(
        torch.stack([found[keys[i]] for i in order]),
        tuple(values[i] for i in order),
        tuple(key_seed[keys[i]] for i in order),
        tuple(alive),
        scored + len(keys),
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
