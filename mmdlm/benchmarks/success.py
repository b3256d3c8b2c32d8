"""Success rate of a policy in simulation, and inputs to measure its latency without one."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np

from mmdlm.benchmarks.answers import ways
from mmdlm.benchmarks.captions import SEED, drawn
from mmdlm.benchmarks.report import Score
from mmdlm.data.dataset import example
from mmdlm.data.scenes import Scenes
from mmdlm.messages import Example, Turn
from mmdlm.model import MultimodalDLM
from mmdlm.simulators.metaworld import INSTRUCTIONS
from mmdlm.simulators.rollout import TRAINED, evaluate, simulators, wilson
from mmdlm.tasks.act import Policy


def success(
    model: MultimodalDLM,
    decodings: str,
    count: int = 20,
    seed: int = 0,
    name: str = "",
    sim: str | Items[str] = TRAINED,
    execute: int | None = None,
    horizon: int = 200,
) -> list[Score]:
    """Success rate over seeds, for every task and decoding.

    Args:
        model: a policy's model.
        decodings: see `mmdlm.benchmarks.answers.ways`.
        count: episodes per task.
        seed: seed of the first episode.
        name: name of the checkpoint in the report.
        sim: simulators, see `mmdlm.simulators.rollout.simulators`.
        execute: actions executed per query; None: 4, or the checkpoint's value if smaller.
        horizon: steps of an episode.
    """
    scores = []
    for way, strategies in ways(model, "act", decodings).items():
        policy = Policy(model, strategies=strategies)
        played = min(4, policy.execute) if execute is None else execute
        results = [
            evaluate(policy, task, range(seed, seed + count), played, horizon)
            for task in simulators(sim, policy)
        ]
        parts = [(r.name, r.successes, len(r.episodes), r.episodes, r.settings) for r in results]
        if len(parts) > 1:
            everything = tuple(e for r in results for e in r.episodes)
            won = sum(r.successes for r in results)
            parts.append(("all", won, len(everything), everything, None))
        for part, won, total, episodes, settings in parts:
            low, high = wilson(won, total)
            ms = float(np.median([e.infer_ms for e in episodes]))
            forwards = float(np.mean([e.forwards for e in episodes]))
            if settings is not None:
                settings = settings | {"episodes": [e.to_dict() for e in episodes]}
            scores.append(Score("act", part, name, way, "success", won / total, total, low, high))
            scores[-1] = replace(scores[-1], ms=ms, forwards=forwards, settings=settings)
    return scores


def act_samples(model: MultimodalDLM, count: int, seed: int = SEED) -> list[Example]:
    """Observations to time a policy with: drawn images, states of the data's range.

    Latency does not depend on the observation, since every chunk has the same number of tokens.

    Args:
        model: a policy's model.
        count: number of observations.
        seed: seed of the images.
    """
    robot = model.robot
    tasks = [task.rpartition("/")[2].removesuffix("-v3") for task in Policy(model).tasks]
    texts = [INSTRUCTIONS[t] for t in tasks if t in INSTRUCTIONS] or [_any_text(model)]
    empty = np.zeros((robot.chunk, robot.action_size), np.float32)
    state = np.zeros(robot.state.size or 1, np.float32)
    images = drawn(Scenes(seed=seed, count=count, questions=0), count, seed)
    return [
        example(
            (Turn(texts[i % len(texts)], empty, robot.length),),
            image=sample.media("image")[0],
            state=state,
        )
        for i, sample in enumerate(images)
    ]


def _any_text(model: MultimodalDLM) -> str:
    """Five words of the vocabulary, for a model without known tasks."""
    words = [w for w in (model.tokenizer.words or {"go": 0}) if not w.startswith("<")]
    return " ".join(words[:5])
