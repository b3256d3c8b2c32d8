"""Samples of a dataset answered as a user would, with what it cost, and ways to decode them."""

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
from mmdlm.tasks.generate import fill, finish

OWN, PLAIN = "preset", "plain"
"""Names of two ways to decode: as the checkpoint says, and one token after the other."""


@dataclass(frozen=True)
class Answered:
    """Text answers to the turns of some samples, sample by sample.

    Args:
        texts: per turn.
        tokens: per turn, ids before the end token.
        forwards: per turn, of the backbone.
        seconds: from raw media to tokens, all turns.
    """

    texts: list[str]
    tokens: list[list[int]]
    forwards: list[int]
    seconds: float


def answer(
    model: MultimodalDLM,
    samples: Items[Example],
    strategies: Items[Strategy],
    batch: int = 32,
) -> Answered:
    """Every turn of the samples answered; the answers the samples hold are not looked at.

    Args:
        model: the model.
        samples: with text answers.
        strategies: how to decode.
        batch: answers decoded together.
    """
    examples = [one for sample in samples for one in asked(sample)]
    begin = time.perf_counter()
    filled = fill(model, examples, strategies, batch_size=batch)
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
    """Per turn, whether the answer is the right one, token by token."""
    right = [model.tokenizer.encode(turn.answer) for sample in samples for turn in sample.turns]
    return [tokens == truth for tokens, truth in zip(found.tokens, right, strict=True)]


def ways(model: MultimodalDLM, task: str, names: str) -> dict[str, list[Strategy]]:
    """Strategies by name.

    Args:
        model: the model. An autoregressive one has one way only, token by token.
        task: key of the checkpoint's presets, such as "caption".
        names: separated by commas: "preset" is the checkpoint's own way ("parallel" where it has
            none, "one_step" for actions), "plain" one token after the other, anything else a
            decoding preset.
    """
    own = (model.preset.get(task) or {}).get("strategies")
    # Actions fill their whole canvas; text may end before.
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
        raise ValueError(f"decoding is {names!r}; name at least one, such as {OWN}")
    return found
