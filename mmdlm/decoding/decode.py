"""A batch of prompts decoded from start to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.decoding import preset
from mmdlm.decoding.events import Finished
from mmdlm.decoding.session import NO_TOKEN, Session
from mmdlm.decoding.state import Source
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM, require_model


@dataclass(frozen=True)
class History:
    """When and how confidently each answer position was committed.

    Args:
        step: [B G] int64, 0-based step of the row whose logits filled the position (a step is one
            forward, unless guidance or `Refresh.prefill` adds to it); -1 where none did: known
            beforehand, or ended.
        confidence: [B G] float32 probability of the token at that step, 0 where none did.
    """

    step: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Decoded:
    """A finished decode.

    Args:
        tokens: [B P+G] int64, the padded prompt (media slots hold the pad id) and the answer; one
            that is shorter than others is followed by end tokens.
        nfe: forwards of the backbone, cache refreshes and guidance included. Rows of a batch that
            compute different positions run in separate forwards.
        history: when each answer position was committed.
        forwards: forwards that each row took part in, as many as it takes alone.
    """

    tokens: Tensor
    nfe: int
    history: History
    forwards: tuple[int, ...] = ()


@torch.inference_mode()
def decode(
    model: MultimodalDLM,
    prompt: Tensor | Sequence,
    length: int,
    strategies: preset.Choice = (),
    *,
    mask: Tensor | None = None,
    generator: Source = None,
    columns: slice | None = None,
    canvas: Tensor | None = None,
    on_step: Callable[[Session, Mapping[int, Finished]], None] | None = None,
    alternatives: Mapping[str, Tensor | Sequence] | None = None,
) -> Decoded:
    """A prompt with `length` masked positions filled in.

    Without strategies the most probable position commits at each step, recomputing exactly what
    the model's attention makes necessary: everything for full attention, only the answer for a
    prefix model, only the newest token for an autoregressive one.

    Args:
        model: the model.
        prompt: token ids [B P] or a laid-out Sequence; P may be 0, to write without a prompt.
        length: positions G to fill; the initial number of them for strategies that change it.
        strategies: instances, or the name of a preset, see `preset.strategies`; their order
            matters for guide, observe, stop, revise and end only.
        mask: [B P] key padding of token ids, True = real; pad on the left.
        generator: source of random draws, one for the batch or one per row; None: torch's own. A
            row alone and in a batch agree when they get generators of the same seed.
        columns: range of ids that may be committed (action ids); the head computes only these.
        canvas: [B G] int64 answer of which only the masks are filled in; None: all masks.
        on_step: called before the first step and after each, with the session (the keys of its
            requests are the rows) and the answers that are complete by key.
        alternatives: other prompts of the same rows by name, such as "text" for the prompt without
            its text. Strategies see the logits that the same answer has after them (`CFG`).
    Raises:
        TypeError: the token ids are not integers.
        ValueError: two strategies decide the same one-owner hook or do not fit together, an id is
            not in the vocabulary, the length is not positive, the prompt has no token and the model
            predicts the next one, both are longer than the context of the model, or nothing could
            be written because the model gave NaN.
    """
    require_model(model, "decode")
    session = Session(model, strategies, columns=columns)
    given = {"mask": mask, "generator": generator, "canvas": canvas, "alternatives": alternatives}
    keys = session.add_rows(prompt, length, **given)
    found = {done.key: done for done in session.finished()}
    while True:
        if on_step is not None:
            on_step(session, found)
        if not session.keys:
            break
        session.advance(events=False)
        found |= {done.key: done for done in session.finished()}
    done = [found[key] for key in keys]
    size = max(length, *(len(row.tokens) for row in done))
    given = prompt if isinstance(prompt, Tensor) else prompt.tokens
    answer, step, confidence = (
        torch.stack([F.pad(x, (0, size - len(x)), value=fill) for x in values])
        for values, fill in (
            ([row.tokens for row in done], model.spec.eos_id),
            ([row.step for row in done], -1),
            ([row.confidence for row in done], 0.0),
        )
    )
    if bool(confidence.isnan().any()):
        raise ValueError(NO_TOKEN)
    tokens = torch.cat([given.to(answer.device), answer], 1)
    forwards = tuple(row.forwards for row in done)
    return Decoded(tokens, session.calls, History(step, confidence), forwards)
