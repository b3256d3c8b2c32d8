"""The compared systems: our answer and the plain LaViDa, from one checkpoint folder."""

from __future__ import annotations

import warnings
from pathlib import Path

import mmdlm
from mmdlm.decoding.commits.time_shift import TimeShift
from mmdlm.messages import Media
from mmdlm.model import MultimodalDLM
from tests.speed.answer_shapes import AnswerShape
from tests.speed.plain_lavida import SHIFT, PlainLaViDa
from tests.speed.systems import PLAIN, Answer, Run

MODES = ("none", "prefix-lm")


def check_modes(modes: list[str]) -> list[str]:
    """Checks that all modes are known, and returns them.

    Raises:
        ValueError: one is not.
    """
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"LaViDa has no mode {mode!r}; known: {', '.join(MODES)}")
    return modes


def runner(system: str, model: MultimodalDLM, folder: Path, shape: AnswerShape, mode: str) -> Run:
    """Returns a function that answers the questions of a shape once, from the image file on.

    The plain system answers them one by one and keeps nothing, as published.

    Args:
        system: `tests.speed.systems.OURS` or `PLAIN`.
        model: the loaded checkpoint.
        folder: result of `answer_shapes.write`.
        shape: the shape.
        mode: one of `MODES`.
    """
    image = folder / "image.png"
    if system == PLAIN:
        plain = PlainLaViDa(model, folder, shape.config)

        def run_plain() -> Answer:
            found = []
            for question in shape.questions:
                parts = _prompt(model, image, question)
                found.append(plain.answer(image, *parts, mode, shape.length, shape.steps))
            tokens = [one.tokens[0].tolist() for one in found]
            return Answer(tokens, sum(one.forwards for one in found))

        return run_plain
    # The checkpoint's own strategies are those of prefix-lm.
    chosen = None if mode == "prefix-lm" else [TimeShift(shape.steps, SHIFT)]
    features = {} if shape.again else None

    def run_ours() -> Answer:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*filled the canvas")
            found = mmdlm.answer(
                model,
                shape.questions,
                str(image),
                length=shape.length,
                strategies=chosen,
                details=True,
                features=features,
            )
        return Answer([list(one.tokens) for one in found], sum(one.forwards for one in found))

    return run_ours


def _prompt(model: MultimodalDLM, image: Path, question: str) -> list:
    """Ids of a prompt before and after its image."""
    content = [
        {"type": "image", "image": str(image)},
        {"type": "text", "text": question},
    ]
    parts = model.processor.prompt([{"role": "user", "content": content}])
    return [part.to(model.device) for part in parts if not isinstance(part, Media)]
