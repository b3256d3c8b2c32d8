"""Compares the latency of two models in alternating rounds on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean, median

import torch

from mmdlm.benchmarks.answers import OWN, PLAIN, asked, ways
from mmdlm.benchmarks.report import Race
from mmdlm.decoding.decode import decode
from mmdlm.decoding.strategy import Strategy
from mmdlm.layout import Sequence
from mmdlm.messages import Example
from mmdlm.model import MultimodalDLM

BATCHES = (1, 16)


@dataclass(frozen=True)
class Timed:
    """Cost of one pass over some samples.

    Args:
        encode: milliseconds per answer from raw media to encoded prompts.
        decode: milliseconds per answer from encoded prompts to tokens.
        forwards: backbone forwards per answer.
    """

    encode: float
    decode: float
    forwards: float

    def span(self, name: str) -> float:
        """Milliseconds per answer of "decode", or of the whole "answer"."""
        return self.decode + (self.encode if name == "answer" else 0.0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the number of torch threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(
    model: MultimodalDLM, samples: Items[Example], strategies: Items[Strategy], batch: int
) -> Timed:
    """Wall time of answering samples with one turn each, text or actions, without scores.

    Args:
        model: the model.
        samples: samples with the same canvas length.
        strategies: decoding strategies.
        batch: samples decoded together.
    Raises:
        ValueError: the canvases differ.
    """
    lengths = {turn.length for sample in samples for turn in sample.turns}
    if len(lengths) != 1:
        raise ValueError(f"answers have canvases {sorted(lengths)}, expected one length")
    length = lengths.pop()
    is_text = isinstance(samples[0].turns[0].answer, str)
    columns = None if is_text else slice(model.robot.ids.start, model.robot.ids.stop)
    encoding = decoding = 0.0
    steps: list[int] = []
    for start in range(0, len(samples), batch):
        begin = time.perf_counter()
        sequence = prompts(model, samples[start : start + batch])
        ready = time.perf_counter()
        decoded = decode(model, sequence, length, strategies, columns=columns)
        steps += (
            decoded.history.step.amax(1) + 1
        ).tolist()  # host sync, so that a GPU is timed as well
        decoding += time.perf_counter() - ready
        encoding += ready - begin
    share = 1e3 / len(samples)
    return Timed(encoding * share, decoding * share, mean(steps))


@torch.inference_mode()
def prompts(model: MultimodalDLM, samples: Items[Example]) -> Sequence:
    """The prompts of samples with one turn each as one batch, with encoded media."""
    packed = model.processor.pack([one for sample in samples for one in asked(sample)])
    return model.embed(packed.prompts)


def race(
    model: MultimodalDLM,
    twin: MultimodalDLM,
    what: str,
    task: str,
    samples: Items[Example],
    names: tuple[str, str],
    decodings: str = OWN,
    batches: Items[int] = BATCHES,
    rounds: int = 5,
) -> list[Race]:
    """Wall times of the model against its twin on one thread, for each batch size.

    The models alternate on the same inputs, so that a slower machine affects both; ratios are taken
    within a round. A first pass of each is not counted.

    Args:
        model: the model, decoded by each decoding.
        twin: an autoregressive model, decoded token by token until its answers end.
        what: name of the benchmark.
        task: key of the checkpoint's presets.
        samples: inputs with one turn each.
        names: of the two checkpoints.
        decodings: see `mmdlm.benchmarks.answers.ways`; duplicates are skipped.
        batches: samples decoded together.
        rounds: at least three.
    Raises:
        ValueError: fewer than three rounds.
    """
    if rounds < 3:
        raise ValueError(f"rounds is {rounds}, expected at least 3 for a range")
    chosen: dict[str, list[Strategy]] = {}
    for way, strategies in ways(model, task, decodings).items():
        if strategies not in chosen.values():
            chosen[way] = strategies
    runners = [(model, strategies) for strategies in chosen.values()]
    runners.append((twin, next(iter(ways(twin, task, PLAIN).values()))))
    found = []
    with threads(1):
        for batch in batches:
            for runner, strategies in runners:
                timed(runner, samples[:batch], strategies, batch)
            turns = [
                [timed(runner, samples, strategies, batch) for runner, strategies in runners]
                for _ in range(rounds)
            ]
            *ours, theirs = zip(*turns, strict=True)
            for way, own in zip(chosen, ours, strict=True):
                for span in ("decode", "answer"):
                    head = (what, *names, way, span, batch, len(samples))
                    found.append(_compared(head, own, theirs))
    return found


def _compared(head: tuple, ours: Items[Timed], theirs: Items[Timed]) -> Race:
    """The result of a race over all rounds."""
    span = head[4]
    times = [(a.span(span), b.span(span)) for a, b in zip(ours, theirs, strict=True)]
    ratios = [b / a for a, b in times]
    return Race(
        *head,
        ms=median(a for a, _ in times),
        twin_ms=median(b for _, b in times),
        ratio=median(ratios),
        low=min(ratios),
        high=max(ratios),
        forwards=ours[0].forwards,
        twin_forwards=theirs[0].forwards,
        rounds=len(times),
        threads=torch.get_num_threads(),
    )
