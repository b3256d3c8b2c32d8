"""`mmdlm bench`: scores and latency of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from mmdlm.benchmarks import captions, report, speech, success
from mmdlm.benchmarks.answers import OWN
from mmdlm.benchmarks.report import Line
from mmdlm.benchmarks.speed import race
from mmdlm.checkpoint import load
from mmdlm.messages import Example
from mmdlm.model import MultimodalDLM
from mmdlm.simulators.rollout import TRAINED, simulators
from mmdlm.simulators.simulator import GL_PACKAGES, choose_gl
from mmdlm.tasks.act import Policy

What = Literal["all", "captions", "questions", "digits", "speech", "act", "twin"]
# Key of the checkpoint's presets, default answers per part, inputs of a race.
TASKS = {
    "captions": ("caption", 500, 64),
    "questions": ("answer", 400, 64),
    "digits": ("answer", 360, 64),
    "speech": ("transcribe", 200, 32),
    "act": ("act", 20, 32),
}
DECODINGS = "preset,one_step,parallel,plain"
RACED = "preset,one_step"


@dataclass(frozen=True)
class Bench:
    """One call of `bench`, which documents the arguments."""

    model: str
    twin: str | None
    count: int | None
    seed: int | None
    data: Path | None
    decoding: str | None
    batch: int
    rounds: int
    device: str
    adapter: str | None

    @property
    def label(self) -> str:
        """Name of the model in tables."""
        return self.model if self.adapter is None else f"{self.model} + {self.adapter}"

    @cached_property
    def first(self) -> MultimodalDLM:
        """The model."""
        return load(self.model, device=self.device, adapter=self.adapter)

    @cached_property
    def second(self) -> MultimodalDLM | None:
        """The twin, or None."""
        return None if self.twin is None else load(self.twin, device=self.device)

    def measure(self, what: str, timed_only: bool = False) -> list[Line]:
        """Scores of the model and of its twin, then their race.

        Args:
            what: a key of `TASKS`.
            timed_only: without the scores.
        """
        task, count, inputs = TASKS[what]
        parts = self.parts(what, self.count or (inputs if timed_only else count))
        lines: list[Line] = []
        for name, model in ((self.label, self.first), (self.twin, self.second)):
            if model is not None and not timed_only:
                lines += self.scores(what, task, model, str(name), parts, self.count or count)
        if self.second is not None:
            samples = mixed(parts, inputs) or success.act_samples(self.first, inputs)
            names = (self.label, str(self.twin))
            lines += race(self.first, self.second, what, task, samples, names, rounds=self.rounds)
        return lines

    def parts(self, what: str, count: int) -> dict[str, list[Example]]:
        """Inputs by part; none for "act", which generates them."""
        seed = captions.SEED if self.seed is None else self.seed
        makers: dict[str, Callable[[], dict[str, list[Example]]]] = {
            "captions": lambda: captions.caption_parts(count, seed),
            "questions": lambda: captions.question_parts(count, seed),
            "digits": lambda: captions.digit_parts(count),
            "speech": lambda: speech.speech_parts(count, self.data, seed),
        }
        return makers[what]() if what in makers else {}

    def scores(
        self,
        what: str,
        task: str,
        model: MultimodalDLM,
        name: str,
        parts: dict[str, list[Example]],
        count: int,
    ) -> list[Line]:
        """Scores of one model."""
        if what == "act":
            # Episodes are slow: by default only the checkpoint's preset.
            sim = simulators(TRAINED, Policy(self.first))  # the twin may not list its tasks
            return [*success.success(model, self.decoding or OWN, count, self.seed or 0, name, sim)]
        ways = self.decoding or DECODINGS
        if what == "speech":
            return [*speech.words_wrong(model, parts, ways, name, self.batch)]
        return [*captions.exact(model, what, task, parts, ways, name, self.batch)]


def mixed(parts: dict[str, list[Example]], count: int) -> list[Example]:
    """The first samples of all parts, alternating, at most `count`."""
    turns = zip(*parts.values(), strict=False)
    return [sample for samples in turns for sample in samples][:count]


def bench(
    what: What = "all",
    model: str = "tiny",
    twin: str | None = None,
    count: int | None = None,
    seed: int | None = None,
    data: Path | None = None,
    decoding: str | None = None,
    batch: int = 32,
    rounds: int = 5,
    out: Path | None = None,
    device: str = "cpu",
    adapter: str | None = None,
) -> int:
    """Measure the quality and the speed of a model and print a table.

    mmdlm bench captions --model tiny --decoding preset,plain
    mmdlm bench all --model tiny --twin my-twin --out scores.jsonl

    captions: share of exact captions, on new images of one to three shapes. questions: accuracy
    by kind of question. digits: accuracy on held-out handwritten digits. speech: word error rate
    on new held-out phrases, by known and by new voices. act: success rate over seeds for every
    task of the policy. twin: only the race against an autoregressive twin, for all of these. all:
    everything that this model and installation support.

    mmdlm bench presets compares the decoding presets: accuracy against forwards. mmdlm bench train
    times training steps. The speed of decoding on sizes of published models, without a checkpoint,
    is measured in a clone of the repository: python -m tests.speed --help.

    Args:
        what: what to measure.
        model: bundled name, folder or hub id.
        twin: autoregressive model of the same size; it is scored as well, and its latency is
            compared in alternating rounds on one thread.
        count: images, clips or episodes per part; by default 500 captions, 400 images with five
            questions, all digits, 200 clips, 20 episodes.
        seed: seed of the inputs; by default 12345 (training uses 0 and 1), for "act" 0.
        data: folder with spoken clips; by default new ones are synthesised.
        decoding: separated by commas: preset (the checkpoint's), plain (one token per step) and
            names of decoding presets. Default: preset,one_step,parallel,plain; for
            "act" preset; for races preset,one_step.
        batch: inputs decoded together for the scores.
        rounds: rounds of the race.
        out: JSON-lines file for the results, with versions, threads and processor.
        device: "cpu", "cuda" or "auto".
        adapter: folder or hub id of a LoRA adapter of the model, merged into its weights.
    """
    if what == "twin" and twin is None:
        raise ValueError("bench twin compares two models; give the second one as twin")
    run = Bench(model, twin, count, seed, data, decoding, batch, rounds, device, adapter)
    console = report.terminal()
    lines: list[Line] = []
    is_group = what in ("all", "twin")
    for name in TASKS if is_group else [what]:
        reason = absent(run.first, name, what == "twin") if is_group else ""
        try:
            lines += [] if reason else run.measure(name, timed_only=what == "twin")
        except ImportError as error:
            if not is_group:
                raise
            reason = str(error)
        if reason:
            console.print(f"{name}: skipped: {reason}", markup=False)
    report.show(lines, console)
    if out is not None:
        console.print(f"written to {report.write(out, lines)}", markup=False)
    return 0


def absent(model: MultimodalDLM, what: str, timed_only: bool = False) -> str:
    """Why this model or machine cannot be measured; empty if it can.

    Args:
        model: the model.
        what: a key of `TASKS`.
        timed_only: without simulation.
    """
    needed = {"speech": "audio"}.get(what, "image")
    if needed not in model.encoders:
        return f"the model has no {needed} encoder"
    if what == "act" and model.robot is None:
        return "the model is not a policy"
    if what == "act" and not timed_only:
        tasks = Policy(model).tasks
        if not tasks:
            return "the checkpoint lists no tasks"
        if choose_gl() is None and tuple(tasks) != ("toy",):
            return f"there is no OpenGL backend; {GL_PACKAGES}"
    return ""
