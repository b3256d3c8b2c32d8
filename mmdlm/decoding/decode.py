"""The denoising loop."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.backbones.linear import uses_packed
from mmdlm.decoding import preset
from mmdlm.decoding.active_positions import reading
from mmdlm.decoding.dispatch import Owners, assign
from mmdlm.decoding.numerics import log_odds
from mmdlm.decoding.resizing import resize
from mmdlm.decoding.rng import Source
from mmdlm.decoding.state import DecodeState
from mmdlm.layout import ANSWER, TOKEN, Sequence, from_tokens, levels
from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class History:
    """When and how surely each answer position was committed.

    Args:
        step: [B G] int64, 0-based step whose logits filled the position (a step is one forward,
            unless guidance or `Refresh.store` adds to it); -1 where none did: known beforehand, or
            ended.
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
        nfe: forwards of the backbone, cache refreshes and guidance included.
        history: when each answer position was committed.
    """

    tokens: Tensor
    nfe: int
    history: History


@torch.inference_mode()
@uses_packed
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
) -> Decoded:
    """A prompt with `length` masked positions filled in.

    Without strategies the most probable position commits at each step, recomputing exactly what
    the model's attention makes necessary: everything for full attention, only the answer for a
    prefix model, only the newest token for an autoregressive one.

    Args:
        model: the model.
        prompt: token ids [B P] or a laid-out Sequence.
        length: positions G to fill; the first number of them for strategies that change it.
        strategies: instances, or the name of a preset, see `preset.strategies`; their order
            matters for guide, stop, revise and end only.
        mask: [B P] key padding of token ids, True = real; pad on the left.
        generator: source of random draws, one for the batch or one per row; None: torch's own. A
            row alone and in a batch agree when they get generators of the same seed.
        columns: range of ids that may be committed (action ids); the head computes only these.
        canvas: [B G] int64 answer of which only the masks are filled in; None: all masks.
    Raises:
        ValueError: two strategies decide the same one-owner hook or exclude each other, the length
            is not positive, the prompt is empty, both are longer than the context of the model, or
            nothing could be written because the model gave NaN.
    """
    owners = assign(preset.strategies(strategies))
    state = start(model, prompt, length, mask, generator, columns, canvas)
    for strategy in owners["begin"]:
        strategy.begin(state)
    _end(state, owners)
    state.wrote()
    done = _leave(state)
    busy = _open(state, owners)
    while busy:
        lasts = _lasts(state, owners)
        _step(state, owners)
        resize(state, owners)
        state.wrote()
        state.step += 1
        state.block_step += 1
        if not lasts:
            done |= _leave(state)
            busy = _open(state, owners)
    done |= _rows(state, range(len(state.rows)))
    state.forget()
    tokens, step, confidence = _stacked(state, [done[i] for i in range(state.batch)], length)
    if bool(confidence.isnan().any()):
        raise ValueError(
            "a position had no possible token: the model gave NaN (check the weights, or load with "
            "dtype=float32), or strategies such as Suppress and Nucleus left none"
        )
    return Decoded(tokens, state.nfe, History(step, confidence))


def start(
    model: MultimodalDLM,
    prompt: Tensor | Sequence,
    length: int,
    mask: Tensor | None,
    generator: Source,
    columns: slice | None,
    canvas: Tensor | None,
) -> DecodeState:
    """The state before the first step: the prompt followed by the canvas."""
    spec = model.spec
    if length < 1:
        raise ValueError(f"length is {length}, expected at least one position to fill")
    if isinstance(prompt, Tensor):
        if prompt.ndim != 2:
            raise ValueError(f"prompt is {list(prompt.shape)}, expected token ids [B P]")
        prompt = from_tokens(prompt, mask, spec.attention, spec.block_size)
    elif mask is not None:
        raise ValueError("mask is for token ids; a Sequence brings its own")
    prompt = prompt.to(model.device)
    batch, size = prompt.tokens.shape
    if batch == 0 or size == 0:
        raise ValueError("the prompt is empty; give at least one row with one token")
    order = torch.arange(length, device=model.device).expand(batch, -1)
    answer = torch.full_like(order, spec.mask_id)
    if canvas is not None:
        if canvas.shape != order.shape:
            raise ValueError(f"canvas is {list(canvas.shape)}, expected {[batch, length]}")
        answer = canvas.to(order)
    role, source = torch.full_like(order, ANSWER), torch.full_like(order, TOKEN)
    last = (prompt.positions * prompt.mask).amax(1, keepdim=True)
    if spec.context is not None:
        spec.fits(int(last.max()) + 1 + length)
    positions = last + 1 + order
    level = levels(role, source, positions, order, spec.attention, spec.block_size)
    sequence = replace(
        prompt,
        tokens=torch.cat([prompt.tokens, answer], 1),
        role=torch.cat([prompt.role, role], 1),
        source=torch.cat([prompt.source, source], 1),
        mask=torch.cat([prompt.mask, torch.ones_like(order, dtype=torch.bool)], 1),
        positions=torch.cat([prompt.positions, positions], 1),
        level=torch.cat([prompt.level, level], 1),
        branch=None,
    )
    return DecodeState(model, sequence, size, generator, _range(columns, model))


def _range(columns: slice | None, model: MultimodalDLM) -> slice | None:
    """The ids that may be committed as a slice with a start and a stop."""
    if columns is None:
        return None
    start, stop, step = columns.indices(model.spec.transformer.vocab)
    if step != 1 or start >= stop or (start, stop) == (model.spec.mask_id, model.spec.mask_id + 1):
        raise ValueError(f"columns is {columns}, expected a range of ids besides the mask id")
    return slice(start, stop)


def _open(state: DecodeState, owners: Owners) -> bool:
    """Asks plan for the window; False when there is nothing left to do."""
    if not state.rows:
        return False
    window = owners["plan"][0].plan(state)
    if window.start >= window.stop:
        return False
    before, state.window = state.window, window
    # The columns of a turn are fewer once rows have left, but it is the same turn; so are those of
    # a last block as answers become shorter or longer.
    is_other = window != before if window.turn is None else window.turn != before.turn
    length, state.planned = state.planned, state.length
    if (
        window.turn is before.turn is None
        and window.start == before.start
        and length != state.length
    ):
        is_other &= before.stop != length and window.stop != state.length
    if is_other:
        if state.step:
            state.block += 1
        state.block_step = 0
        state.block_masks = state.opened(window.start, window.stop).sum(1)
        inside = state.left[:, window.start : window.stop]
        state.block_most = int(inside.sum(1).max())
    return True


def _lasts(state: DecodeState, owners: Owners) -> bool:
    """Whether the window surely stays for another step, so that nobody need look at the device.

    A row that is finished then leaves with the next look; meanwhile it has nothing open. On a CPU,
    where it would be computed for nothing and looking costs nothing, everybody looks.
    """
    if state.thrifty or any(hook in owners for hook in ("stop", "edit", "revise", "end", "resize")):
        return False
    is_even = state.even and state.window.turn is None
    return is_even and owners["plan"][0].steady and owners["select"][0].lasts(state)


def _step(state: DecodeState, owners: Owners) -> None:
    """One step: the forward, what it commits, and what is taken back."""
    spec = state.model.spec
    state.refresh = owners["refresh"][0].refresh(state)
    state.focus(*reading(state, owners))
    logits = state.forward()
    for strategy in owners.get("guide", ()):
        logits = strategy.guide(state, logits)
    logits = state.ban_mask(logits)
    picked = owners["pick"][0].pick(state, logits)
    state.candidates = picked + state.first_id
    state.log_odds = log_odds(logits, picked)
    confidence = owners["score"][0].score(state, logits, picked)
    state.confidence = confidence.masked_fill(~state.open, -torch.inf)
    _commit(state, owners)
    state.worked += state.open.any(1)
    for strategy in owners.get("revise", ()):
        again = strategy.revise(state) & ~state.masked & state.writable
        again &= (state.worked <= 2 * state.asked)[:, None]
        state.tokens.masked_fill_(again, spec.mask_id)
        state.commit_step.masked_fill_(again[:, state.prompt :], -1)
        state.commit_confidence.masked_fill_(again[:, state.prompt :], 0.0)
    _end(state, owners)


def _end(state: DecodeState, owners: Owners) -> None:
    """Fills what can only become end tokens, also behind those that are given."""
    for strategy in owners.get("end", ()):
        state.tokens.masked_fill_(strategy.end(state) & state.masked, state.model.spec.eos_id)


def _commit(state: DecodeState, owners: Owners) -> None:
    """Writes what this step takes into the canvas, and records when and how surely."""
    finish = torch.zeros_like(state.open[:, :1])
    for strategy in owners.get("stop", ()):
        finish = finish | strategy.stop(state)[:, None]
    select = owners["select"][0]
    fill, is_open = state.refresh.fill, state.open
    stuck = torch.zeros_like(finish)
    if fill is not None:
        stuck = (is_open & (state.at >= fill.start) & (state.at < fill.stop)).any(1, keepdim=True)
    if fill == state.read:
        taken = is_open
    else:
        # Rows that fill are not asked, nor do they draw, as in a step in which all of them fill.
        state.open = is_open & ~stuck
        taken = select.select(state)
        if not select.may_idle:
            taken = taken.scatter(1, state.confidence.argmax(1, keepdim=True), True)
        state.open = is_open
    taken = taken | stuck
    taken = taken & state.open
    if "stop" in owners:
        taken = taken | (finish & state.here(state.masked))
    state.pending.zero_()
    for strategy in owners.get("edit", ()):
        # Of what no mask can change any more, caches keep the keys.
        changing = state.unsettled.to(taken.device)
        written = state.here(state.writable & ~state.masked & changing)
        edited = strategy.edit(state) & written
        taken = taken | (edited & state.here(state.within()))
    state.taken = taken
    state.put(state.tokens, taken, state.candidates)
    state.put(state.commit_step, taken, state.step, state.prompt)
    state.put(state.commit_confidence, taken, state.probability, state.prompt)


def _stacked(state: DecodeState, rows: Items[tuple[Tensor, ...]], length: int) -> Items[Tensor]:
    """Tokens, steps and confidences of all rows, as long as the longest and as was asked for."""
    size = max(length + state.prompt, *(len(tokens) for tokens, _, _ in rows))
    fillings = (state.model.spec.eos_id, -1, 0.0)
    return [
        torch.stack([F.pad(row[i], (0, size - len(row[0])), value=fill) for row in rows])
        for i, fill in enumerate(fillings)
    ]


def _leave(state: DecodeState) -> dict[int, tuple[Tensor, ...]]:
    """Takes finished rows out of the batch; their results by index in the caller's batch."""
    busy = state.left.any(1)
    if bool(busy.all()):
        return {}
    done = _rows(state, (~busy).nonzero()[:, 0].tolist())
    state.keep(busy.nonzero()[:, 0])
    return done


def _rows(state: DecodeState, rows: Items[int]) -> dict[int, tuple[Tensor, ...]]:
    """Tokens, steps and confidences of some rows by index in the caller's batch."""
    return {
        state.rows[i]: (state.tokens[i], state.commit_step[i], state.commit_confidence[i])
        for i in rows
    }
