"""The rows of a request before their first step: prompt and canvas."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from numbers import Integral

import torch
from torch import Tensor

from encoders.checks import shown
from mmdlm.backbones.family import MOST_TOKENS, Spec
from mmdlm.decoding.rows import pad, widen
from mmdlm.decoding.state import Source, State, Streams
from mmdlm.decoding.strategy import Strategy
from mmdlm.layout import Sequence, append_answer, from_tokens
from mmdlm.messages import check_ids
from mmdlm.model import MultimodalDLM
from mmdlm.processor import Packed


def start(
    model: MultimodalDLM,
    prompt: Tensor | Sequence,
    length: int,
    mask: Tensor | None = None,
    generator: Source = None,
    columns: slice | None = None,
    canvas: Tensor | None = None,
    first_key: int = 0,
    alternatives: Mapping[str, Tensor | Sequence] | None = None,
) -> State:
    """The prompt followed by the canvas.

    Args:
        model: the model.
        prompt: token ids [B P] or a laid-out Sequence.
        length: positions G to fill.
        mask: [B P] key padding of token ids, True = real.
        generator: source of random draws.
        columns: ids that may be committed.
        canvas: [B G] int64 answer of which only the masks are filled in; None: all masks.
        first_key: key of the first row; the others count on from it.
        alternatives: other prompts for the same answers, see `mmdlm.decode`.
    Raises:
        ValueError: see `mmdlm.decode`.
    """
    spec = model.spec
    if spec.mask_id is None:
        raise spec.unknown_mask()
    check_length(length)
    if isinstance(prompt, Tensor):
        if prompt.ndim != 2:
            raise ValueError(f"prompt is {list(prompt.shape)}, expected token ids [B P]")
        prompt = from_tokens(prompt, mask, spec.attention, spec.block_size)
    elif mask is not None:
        raise ValueError("mask is for token ids; a Sequence brings its own")
    vocab = spec.transformer.vocab
    check_ids(prompt.tokens, vocab, "prompt")  # before it is moved: on the host nothing waits
    prompt = _opened(prompt, spec).to(model.device)
    batch, size = prompt.tokens.shape
    answer = torch.full((batch, length), spec.mask_id, device=model.device)
    if canvas is not None:
        if canvas.shape != answer.shape:
            raise ValueError(f"canvas is {list(canvas.shape)}, expected {[batch, length]}")
        check_ids(canvas, max(vocab, spec.mask_id + 1), "canvas")
        answer = canvas.to(answer)
    made = Streams.of(generator, batch, model.device)
    keys = list(range(first_key, first_key + batch))
    draws = [(made, i) for i in range(batch)]
    sequence = append_answer(spec, prompt, answer)
    if spec.context is not None:
        spec.fits(int(sequence.positions[:, -1].max()) + 1)
    state = State(model, sequence, size, keys, draws, committable(columns, model))
    for name, other in (alternatives or {}).items():
        twin = start(model, other, length, None, None, columns, canvas, first_key)
        if len(twin.keys) != batch:
            raise ValueError(
                f"the alternative prompt {name!r} has {len(twin.keys)} rows, expected {batch}"
            )
        twin.draws = state.draws
        missing = twin.prompt - state.prompt
        widen(twin, max(0, -missing), 0)
        widen(state, max(0, missing), 0)  # with the alternatives so far
        state.alternatives[name] = twin
    return state


def unpacked(
    model: MultimodalDLM,
    prompt: Tensor | Sequence | Packed,
    length: int | None,
    canvas: Tensor | None,
    features: dict[Hashable, Tensor],
) -> tuple[Tensor | Sequence, int, Tensor | None]:
    """Prompt, length and canvas [1 G] of a request, see `Session.add`.

    Args:
        model: the model.
        prompt: token ids, a Sequence, or a packed example, whose media are encoded.
        length: positions to fill; None for a packed example.
        canvas: [G] or [1 G]; None for a packed example.
        features: embeddings of media that are encoded already, by content; updated.
    Raises:
        ValueError: length or canvas are given where they must not be, or the length is missing.
    """
    if isinstance(prompt, Packed):
        if length is not None or canvas is not None:
            raise ValueError("a packed example brings its canvas; leave length and canvas out")
        canvas = prompt.canvas
        return model.embed(prompt.prompts, features), canvas.shape[1], canvas
    if length is None:
        raise ValueError("give length=, the positions to fill; only packed examples bring it")
    return prompt, length, canvas if canvas is None or canvas.ndim == 2 else canvas[None]


def _opened(prompt: Sequence, spec: Spec) -> Sequence:
    """The prompt; one without positions gets a position of padding, which changes no result.

    Raises:
        ValueError: there are no rows, or a row has no token and the model needs one.
    """
    batch, size = prompt.tokens.shape
    if batch == 0:
        raise ValueError("the prompt has no rows, expected at least one")
    if spec.shift and not bool(prompt.mask.any(1).all()):
        raise ValueError(
            "the prompt is empty, but each position of this model predicts the next token; give at "
            "least one token, such as the one that begins a text (BOS)"
        )
    return prompt if size else pad(prompt, 1, 0, spec.pad_id, spec.eos_id)


def committable(columns: slice | None, model: MultimodalDLM) -> slice | None:
    """The ids that may be committed as a slice with a start and a stop.

    Raises:
        ValueError: there are none besides the mask id, or the slice has a step.
    """
    if columns is None:
        return None
    start, stop, step = columns.indices(model.spec.transformer.vocab)
    if step != 1 or start >= stop or (start, stop) == (model.spec.mask_id, model.spec.mask_id + 1):
        raise ValueError(f"columns is {columns}, expected a range of ids besides the mask id")
    return slice(start, stop)


def fitting(strategies: list[Strategy], model: MultimodalDLM) -> list[Strategy]:
    """The strategies, with the one that a model without masks needs if none decides what it reads.

    Args:
        strategies: of the request.
        model: the model.
    """
    if model.spec.attention != "canvas" or any("show" in each.hooks() for each in strategies):
        return strategies
    from mmdlm.decoding.commits.uniform_canvas import UniformCanvas

    return [*strategies, UniformCanvas()]


def check_length(length: int) -> None:
    """Raises ValueError unless a length is an integer from 1 to `MOST_TOKENS`."""
    is_whole = isinstance(length, Integral) and not isinstance(length, bool)
    if not is_whole or not 1 <= length <= MOST_TOKENS:
        raise ValueError(
            f"length is {shown(length)}, expected an integer number of tokens, at least 1 and at "
            f"most {MOST_TOKENS:,}"
        )
