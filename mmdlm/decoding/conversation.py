"""What a finished request keeps for the next turn of its conversation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdlm.decoding.state import State
from mmdlm.layout import MEDIUM, PROMPT, TOKEN, Sequence, chosen, levels
from mmdlm.messages import check_ids
from mmdlm.model import MultimodalDLM


@dataclass(frozen=True, eq=False)
class Turn:
    """A finished row without padding.

    Args:
        sequence: prompt and answer, [1 n].
        level: [n] int64 on the host.
        keys: per layer [heads n head_dim]; empty without a cache.
        values: as the keys.
        final: levels below it are valid in the keys and values.
    """

    sequence: Sequence
    level: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    final: int


def saved(state: State, row: int) -> Turn:
    """A row of a batch as it stands."""
    real = (state.level[row] >= 0).nonzero()[:, 0].to(state.tokens.device)
    one = chosen(state.sequence, torch.tensor([row], device=state.tokens.device))
    cut = {
        name: value[:, real]
        for name, value in vars(one).items()
        if isinstance(value, Tensor) and name != "media"
    }
    kv = state.caches.get("canvas") if set(state.caches) == {"canvas"} else None
    keys, values = (
        [each[row][:, real.to(each.device)] for each in buffers]
        for buffers in (([], []) if kv is None else (kv.keys, kv.values))
    )
    level = state.level[row, real.cpu()]
    return Turn(replace(one, **cut), level, keys, values, int(state.final[row]))


def continued(model: MultimodalDLM, turn: Turn, ids: Tensor) -> Sequence:
    """The conversation so far and the ids [n] that follow, as a prompt of one row.

    The answer counts up to its first end token.

    Raises:
        ValueError: an id is not in the vocabulary, or there is more than one row of them.
    """
    spec, was = model.spec, turn.sequence
    if ids.ndim != 1:
        raise ValueError(f"prompt is {list(ids.shape)}, expected token ids [n]")
    check_ids(ids, spec.transformer.vocab, "prompt")
    ends = torch.tensor([spec.eos_id, *spec.stop_ids], device=was.tokens.device)
    ended = torch.isin(was.tokens, ends) & was.is_answer
    size = int(ended[0].int().argmax()) + 1 if bool(ended.any()) else was.tokens.shape[1]
    ids = ids.to(was.tokens)[None]
    new = torch.ones_like(ids)
    tokens = torch.cat([was.tokens[:, :size], ids], 1)
    role = torch.full_like(tokens, PROMPT)
    source = torch.cat([was.source[:, :size], TOKEN * new], 1)
    after = was.positions[:, size - 1 : size] + new.cumsum(1)
    positions = torch.cat([was.positions[:, :size], after], 1)
    order = torch.zeros_like(tokens)
    level = levels(role, source, positions, order, spec.attention, spec.block_size)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return replace(
        was,
        tokens=tokens,
        role=role,
        source=source,
        mask=mask,
        positions=positions,
        level=level,
        branch=None,
    )


def resume(state: State, turn: Turn) -> None:
    """Takes over keys and values that the new text cannot have changed.

    Those of a position depend on tokens of its own level and below only. So all levels below the
    lowest one in which the texts differ stay valid.

    Args:
        state: a new row, before its first step.
        turn: the finished batch row of the same conversation.
    """
    real = (state.level[0] >= 0).nonzero()[:, 0]
    level, was, now = state.level[0, real], turn.sequence, state.sequence
    size = min(len(real), was.tokens.shape[1])
    at = real[:size].to(now.tokens.device)
    same = (now.tokens[0, at] == was.tokens[0, :size]) & (
        now.positions[0, at] == was.positions[0, :size]
    )
    same = same.cpu() & (level[:size] == turn.level[:size])
    medium = ((now.source[0, at] == MEDIUM) | (was.source[0, :size] == MEDIUM)).cpu()
    media = now.media is not None and was.media is not None
    if not (media and now.media.shape == was.media.shape and bool((now.media == was.media).all())):
        same &= ~medium
    other = torch.cat([level[:size][~same], turn.level[:size][~same], level[size:]])
    other = torch.cat([other, turn.level[size:], torch.tensor([turn.final])])
    final = int(other.min())
    if not turn.keys or final <= int(level.min()):
        return
    kv = state.model.backbone.cache(1, state.length)
    for mine, theirs in zip((*kv.keys, *kv.values), (*turn.keys, *turn.values), strict=True):
        mine[0][:, at.to(mine.device)] = theirs[:, :size]
    state.caches["canvas"] = kv
    state.final += final
