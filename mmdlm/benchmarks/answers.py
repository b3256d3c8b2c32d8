"""Answers the samples of a dataset and measures the cost; decoding by name."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from mmdlm.decoding import preset
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.strategy import Strategy
from mmdlm.messages import Example, Slot, assistant
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import fill, finish, resolve_settings

OWN, PLAIN = "preset", "plain"
"""Names of two decodings: the checkpoint's preset, and one token per step."""


@dataclass(frozen=True)
class Answered:
    """Text answers to all turns of some samples, in order.

    Args:
        texts: answer per turn.
        tokens: ids before the end token, per turn.
        forwards: backbone forwards per turn.
        seconds: total wall time from raw media to tokens.
    """

    texts: list[str]
    tokens: list[list[int]]
    forwards: list[int]
    seconds: float


def answer(
    model: MultimodalDLM,
    samples: Items[Example],
    strategies: Items[Strategy] | None = None,
    batch: int = 32,
) -> Answered:
    """Answers every turn of the samples; their reference answers are not used.

    Args:
        model: the model, also one in training, whose modules get their modes back.
        samples: samples with text answers.
        strategies: decoding strategies; None for those of the model's answers.
        batch: answers decoded together.
    """
    if strategies is None:
        strategies = resolve_settings(model, "answer", needs_prompt=False).strategies
    examples = [one for sample in samples for one in asked(sample)]
    modes = [(module, module.training) for module in model.modules()]  # frozen parts have another
    model.eval()
    begin = time.perf_counter()
    try:
        filled = fill(model, examples, strategies, batch_size=batch)
    finally:
        for module, mode in modes:
            module.training = mode
    seconds = time.perf_counter() - begin
    done = [finish(model, each) for each in filled]
    return Answered(
        [each.text for each in done],
        [list(each.tokens) for each in done],
        [each.forwards for each in done],
        seconds,
    )


def asked(sample: Example) -> list[Example]:
    """Every conversation of an example with its answer blanked out."""
    return [
        Example((*messages[:-1], assistant(Slot(slot.output, slot.length))))
        for messages in sample.conversations
        for slot in messages[-1].parts
    ]


def hits(model: MultimodalDLM, samples: Items[Example], found: Answered) -> list[bool]:
    """Whether each answer equals the reference, token by token."""
    right = [model.tokenizer.encode(turn.answer) for sample in samples for turn in sample.turns]
    return [tokens == truth for tokens, truth in zip(found.tokens, right, strict=True)]


def ways(model: MultimodalDLM, task: str, names: str) -> dict[str, list[Strategy]]:
    """Strategies by name.

    Args:
        model: the model. An autoregressive one is always decoded token by token.
        task: key of the checkpoint's presets, for example "caption".
        names: separated by commas: "preset" is the checkpoint's preset ("parallel" without one,
            "one_step" for actions), "plain" one token per step, others are decoding presets.
    """
    own = (model.preset.get(task) or {}).get("strategies")
    # Actions fill their whole canvas; text may be shorter.
    plain: list[Strategy] = [] if task == "act" else [EndOfText()]
    if model.spec.block_size == 1:
        return {PLAIN: preset.strategies(own) if own else plain}
    found: dict[str, list[Strategy]] = {}
    for name in filter(None, map(str.strip, names.split(","))):
        chosen: Any = name
        if name == OWN:
            chosen = own or ("one_step" if task == "act" else "parallel")
        found[name] = plain if name == PLAIN else preset.strategies(chosen)
    if not found:
        raise ValueError(f"decoding is {names!r}, expected at least one name, for example {OWN}")
    return found
