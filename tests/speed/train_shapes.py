"""Training steps that are timed, and the two systems that run them."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mmdlm.backbones.config import TransformerConfig
from mmdlm.layout import Row, Turn
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.objective import Batch
from mmdlm.training import tune
from mmdlm.training.optimizer import AdamW
from tests.speed.plain_train import PlainTrainer
from tests.speed.shapes import SMALL, TINY, WIDE
from tests.speed.systems import PLAIN

LR = 1e-6
"""So low that rounding errors do not grow over the rounds; the rate does not change the cost."""


@dataclass(frozen=True)
class TrainShape:
    """One training step.

    Args:
        name: name on the command line.
        transformer: sizes of the model.
        prompt: tokens of each row that are never masked.
        answer: tokens of each row that may be.
        rows: batch size.
    """

    name: str
    transformer: TransformerConfig
    prompt: int
    answer: int
    rows: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * (self.prompt + self.answer)


TRAININGS = {
    shape.name: shape
    for shape in (
        TrainShape("train-tiny", TINY, 48, 16),
        TrainShape("answer64v126", WIDE, 256, 64),
        TrainShape("answer64", SMALL, 256, 64),
        TrainShape("all512v126", WIDE, 0, 512),
        TrainShape("all512", SMALL, 0, 512),
    )
}


def find(names: Items[str]) -> list[TrainShape]:
    """Shapes by name.

    Raises:
        ValueError: there is no such shape.
    """
    for name in names:
        if name not in TRAININGS:
            near = difflib.get_close_matches(name, TRAININGS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"there is no shape {name!r}; {hint}known: {', '.join(TRAININGS)}")
    return [TRAININGS[name] for name in names]


def batch_of(model: MultimodalDLM, shape: TrainShape, seed: int) -> Batch:
    """A batch of random tokens."""
    stream = torch.Generator().manual_seed(seed)
    length, high = shape.prompt + shape.answer, shape.transformer.vocab - 1
    ids = torch.randint(2, high, (shape.rows, length), generator=stream)
    rows = [Row((), (Turn(row[: shape.prompt], row[shape.prompt :]),)) for row in ids]
    phase = torch.arange(shape.rows).double() / shape.rows
    seeds = torch.arange(shape.rows) + seed
    return Batch(model.arrange(rows), seeds.to(model.device), phase.to(model.device))


class Trainer(NamedTuple):
    """One of the systems.

    Args:
        step: does one training step; gives its loss and the CPU seconds of its parts.
        exact: the loss that the next step should have, which is not timed; None: what it has.
    """

    step: Callable[[], tuple[float, dict[str, float]]]
    exact: Callable[[], float] | None = None


def trainer(system: str, model: MultimodalDLM, shape: TrainShape, seed: int) -> Trainer:
    """Returns the functions of a system.

    Both systems mask the same tokens; those of our objective are drawn beforehand for the plain
    one.

    Args:
        system: `OURS` or `PLAIN`.
        model: result of `shapes.synthetic`.
        shape: the shape.
        seed: seed of the tokens.
    """
    batch, objective = batch_of(model, shape, seed), Masked()
    if system == PLAIN:
        plain = PlainTrainer(model, LR)
        noise, sequence = objective.corrupt(batch), batch.sequence
        given = (sequence.tokens, sequence.is_answer, noise.masked, noise.p)
        return Trainer(lambda: (plain.step(*given), {}), lambda: plain.exact(*given))
    model.train().requires_grad_()
    optimizer = AdamW(lr=LR).build(tune.groups(model, {}, LR, 0.0))

    def step() -> tuple[float, dict[str, float]]:
        begin = time.process_time()
        hidden = _timed(model, "hidden_at")
        loss = objective.step(model, batch).mean()
        blocks = hidden.pop()
        forward = time.process_time() - begin
        loss.backward()
        backward = time.process_time() - begin - forward
        optimizer.step()
        optimizer.zero_grad()
        parts = {
            "blocks": blocks,
            "head, loss and their gradient": forward - blocks,
            "backward of the blocks": backward,
            "optimizer": time.process_time() - begin - forward - backward,
        }
        return float(loss.detach()), parts

    return Trainer(step)


def _timed(owner: Any, name: str) -> list[float]:
    """CPU seconds of the next call of a method, which is replaced for it."""
    method, seconds = getattr(owner, name), []

    def call(*given: Any) -> Any:
        delattr(owner, name)
        begin = time.process_time()
        found = method(*given)
        seconds.append(time.process_time() - begin)
        return found

    setattr(owner, name, call)
    return seconds
