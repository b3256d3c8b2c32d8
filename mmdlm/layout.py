"""Where text, media and answers sit in a sequence, and who may attend to whom.

Everything about attention is one integer per token, its level: a query attends to the keys whose
level is not above its own. Full attention has one level; a prefix model has two (prompt, answer);
block-causal attention counts blocks; autoregression counts tokens. Keys below a query's level
never depend on it, which is exactly what a cache may keep.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from encoders.features import Prepared

PROMPT, ANSWER = 0, 1
"""Roles of a position: given, or to be filled in."""
TOKEN, MEDIUM = 0, 1
"""Sources of a position's embedding: the token table, or an encoder."""
GOLDEN = 0.6180339887498949
"""Fractional part of the golden ratio: its multiples spread evenly over [0, 1), turn by turn."""
Attention = Literal["full", "prefix", "cascade", "block_causal"]
"""full: bidirectional attention. prefix: the prompt does not attend to the answer. cascade: media
attend to media, the prompt text to media and text, the answer to all. block_causal: tokens attend
to their own block and earlier ones. With a block size, the answer of prefix and cascade is
block-causal."""


Part = Tensor | Prepared
"""Token ids int64 [n], embeddings float [n D], or a preprocessed item before it is encoded."""


@dataclass(frozen=True)
class Turn:
    """A prompt and the answer canvas that follows it.

    Args:
        prompt: token ids int64 [n]; or parts as in `Row.parts`.
        answer: token ids int64 [G], which may be masks; may be empty.
    """

    prompt: Tensor | tuple[Part, ...]
    answer: Tensor

    @property
    def parts(self) -> tuple[Part, ...]:
        """The prompt as parts."""
        return (self.prompt,) if isinstance(self.prompt, Tensor) else tuple(self.prompt)


@dataclass(frozen=True)
class Row:
    """One row of a batch before it is laid out.

    Args:
        parts: what all turns share, in order: token ids int64 [n], embeddings float [n D], or a
            preprocessed item, which `MultimodalDLM.embed` replaces by its embeddings.
        turns: prompts with answers. Several turns see the parts but not each other, so one image
            is encoded once for all its questions; only media under cascade attention can be shared.
    """

    parts: tuple[Part, ...]
    turns: tuple[Turn, ...] = ()

    @property
    def items(self) -> list[Prepared]:
        """The preprocessed items of the row, in order."""
        parts = (*self.parts, *(part for turn in self.turns for part in turn.parts))
        return [part for part in parts if isinstance(part, Prepared)]

    def map(self, change: Callable[[Prepared], Tensor]) -> Row:
        """The row with every preprocessed item replaced.

        Args:
            change: item to its embeddings [N D].
        """

        def changed(parts: Items[Part]) -> tuple[Part, ...]:
            return tuple(change(part) if isinstance(part, Prepared) else part for part in parts)

        turns = tuple(Turn(changed(turn.parts), turn.answer) for turn in self.turns)
        return Row(changed(self.parts), turns)

    def without_answers(self) -> Row:
        """The row as a prompt; several turns are an error, as only one can follow."""
        if len(self.turns) > 1:
            raise ValueError(f"{len(self.turns)} turns share a row; decode them one by one")
        return Row((*self.parts, *(part for turn in self.turns for part in turn.parts)))


@dataclass(frozen=True)
class Sequence:
    """A laid-out batch; rows are padded on the left, and padding never changes a row's result.

    Args:
        tokens: [B L] int64; media slots and padding hold the pad id.
        role: [B L] int64, PROMPT or ANSWER.
        source: [B L] int64, TOKEN or MEDIUM.
        mask: [B L] bool, True = real.
        positions: [B L] int64 rotary positions; the turns of a row all follow its shared part.
        level: [B L] int64, see the module.
        branch: [B L] int64, 0 = shared, j = turn j; None when no row has more than one turn.
        media: [N D] embeddings of all media slots, row by row; None without media.
    """

    tokens: Tensor
    role: Tensor
    source: Tensor
    mask: Tensor
    positions: Tensor
    level: Tensor
    branch: Tensor | None = None
    media: Tensor | None = field(default=None, repr=False)

    @property
    def is_answer(self) -> Tensor:
        """[B L] bool, positions to be filled in; never padding."""
        return (self.role == ANSWER) & self.mask

    @property
    def is_medium(self) -> Tensor:
        """[B L] bool, positions whose embedding an encoder gives."""
        return self.source == MEDIUM

    def to(self, device: torch.device | str) -> Sequence:
        """The same sequence on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def with_tokens(self, tokens: Tensor) -> Sequence:
        """The same layout holding other tokens [B L]."""
        return replace(self, tokens=tokens)

    def visible(self) -> Tensor | None:
        """[B L L] bool, True where the query may attend to the key; None when all may."""
        return visible(self.level, self.level, self.mask, self.branch, self.branch)


def chosen(sequence: Sequence, rows: Tensor) -> Sequence:
    """Some rows of a batch without branches, with their media.

    Args:
        sequence: the batch.
        rows: int64 [n] on its device, each as often as it is wanted.
    """
    media = sequence.media
    if media is not None:
        slots = sequence.source == MEDIUM
        number = (slots.flatten().cumsum(0) - 1).view_as(slots)[rows]
        media = media[number[slots[rows]]]
    names = ("tokens", "role", "source", "mask", "positions", "level")
    return replace(sequence, **{n: getattr(sequence, n)[rows] for n in names}, media=media)


def visible(
    query_level: Tensor,
    key_level: Tensor,
    key_mask: Tensor,
    query_branch: Tensor | None = None,
    key_branch: Tensor | None = None,
) -> Tensor | None:
    """Who attends to whom: [B M L] bool, or None when every query sees every key.

    Args:
        query_level: [B M] int64.
        key_level: [B L] int64.
        key_mask: [B L] bool, True = real.
        query_branch: [B M] int64; None without branches.
        key_branch: [B L] int64; None without branches.
    """
    if query_branch is None and bool(key_mask.all()):
        lowest, highest = query_level.min(), key_level.max()
        if bool(highest <= lowest):
            return None
    seen = seen_by(query_level, key_level, key_mask)
    if query_branch is not None:
        own = key_branch[:, None] == query_branch[..., None]
        seen = seen & (own | (key_branch[:, None] == 0))
    return seen


def seen_by(query_level: Tensor, key_level: Tensor, key_mask: Tensor) -> Tensor:
    """[B M L] bool, which keys each query may attend to; see `visible`."""
    return (key_level[:, None] <= query_level[..., None]) & key_mask[:, None]


def levels(
    role: Tensor,
    source: Tensor,
    positions: Tensor,
    order: Tensor,
    attention: Attention,
    block_size: int | None,
) -> Tensor:
    """[B L] int64 level of each token.

    Args:
        role: [B L] PROMPT or ANSWER.
        source: [B L] TOKEN or MEDIUM.
        positions: [B L] int64.
        order: [B L] int64, index of a token within its answer; 0 elsewhere.
        attention: the model's attention.
        block_size: tokens per block where blocks matter.
    Raises:
        ValueError: the attention is unknown, or block_causal came without a block size.
    """
    block = order // block_size if block_size else torch.zeros_like(order)
    if attention == "full":
        return torch.zeros_like(role)
    if attention == "prefix":
        return role * (1 + block)
    if attention == "cascade":
        return torch.where(role == ANSWER, 2 + block, (source == TOKEN).long())
    if attention == "block_causal":
        if not block_size:
            raise ValueError("block_causal attention needs block_size, the tokens per block")
        return positions // block_size
    raise ValueError(
        f"attention {attention!r} is unknown; expected full, prefix, cascade or block_causal"
    )


def arrange(
    rows: Items[Row], *, pad: int, attention: Attention = "full", block_size: int | None = None
) -> Sequence:
    """Rows of unequal length as one left-padded batch.

    Args:
        rows: at least one.
        pad: id that stands in padding and media slots.
        attention: see `Attention`.
        block_size: tokens per block where blocks matter.
    Raises:
        ValueError: there are no rows, or a row is empty.
    """
    if not rows:
        raise ValueError("arrange: no rows; give at least one")
    for row in rows:
        _check_shared(row, attention)
    media = [part for row in rows for part in _embeddings(row)]
    laid = [_lay(row, pad) for row in rows]
    length = max(row.shape[1] for row in laid)
    if min(row.shape[1] for row in laid) == 0:
        raise ValueError("arrange: a row holds neither media nor text; give it a prompt")
    table = torch.zeros(len(rows), 7, length, dtype=torch.long)
    for i, row in enumerate(laid):
        table[i, :, length - row.shape[1] :] = row
    tokens, role, source, mask, positions, order, branch = table.unbind(1)
    tokens = tokens.masked_fill(mask == 0, pad)
    sequence = Sequence(
        tokens,
        role,
        source,
        mask.bool(),
        positions,
        levels(role, source, positions, order, attention, block_size),
        branch if any(len(row.turns) > 1 for row in rows) else None,
        torch.cat(media) if media else None,
    )
    return sequence.to(media[0].device) if media else sequence


def _check_shared(row: Row, attention: Attention) -> None:
    """Checks that what several turns share cannot attend to their prompts."""
    if len(row.turns) < 2 or not row.parts:
        return
    if attention != "cascade":
        raise ValueError(
            f"arrange: {len(row.turns)} turns share media, but in {attention} attention these see "
            "the prompts; use cascade attention or one row per turn"
        )
    if not all(part.is_floating_point() for part in row.parts):
        raise ValueError(
            f"arrange: {len(row.turns)} turns have shared text, which would see their prompts; put "
            "the text into each turn's prompt"
        )


def _embeddings(row: Row) -> list[Tensor]:
    """The embeddings [n D] of a row, in order."""
    parts = (*row.parts, *(part for turn in row.turns for part in turn.parts))
    items = [part for part in parts if isinstance(part, Prepared)]
    if items:
        raise TypeError(f"arrange: {items[0].kind} is not embedded yet; use MultimodalDLM.embed")
    return [part for part in parts if part.is_floating_point()]


def _lay(row: Row, pad: int) -> Tensor:
    """One row as int64 [7 n]: token, role, source, real, position, order and branch."""
    spans = []

    def span(part: Tensor, role: int, start: int, branch: int) -> int:
        source = MEDIUM if part.is_floating_point() else TOKEN
        n = torch.arange(len(part))
        ones = torch.ones_like(n)
        ids = pad * ones if source == MEDIUM else part
        order = n if role == ANSWER else 0 * n
        spans.append(
            torch.stack([ids, role * ones, source * ones, ones, start + n, order, branch * ones])
        )
        return start + len(part)

    shared = 0
    for part in row.parts:
        shared = span(part, PROMPT, shared, 0)
    for j, turn in enumerate(row.turns, 1):
        at = shared
        for part in turn.parts:
            at = span(part, PROMPT, at, j)
        span(turn.answer, ANSWER, at, j)
    return torch.cat(spans, 1) if spans else torch.zeros(7, 0, dtype=torch.long)


def from_tokens(
    tokens: Tensor, mask: Tensor | None, attention: Attention, block_size: int | None
) -> Sequence:
    """A text-only batch [B L] as a Sequence.

    Args:
        tokens: [B L] int64.
        mask: [B L] bool or 0/1, True = real; None: all real.
        attention: see `Attention`; prefix and cascade treat the tokens as prompt text.
        block_size: tokens per block where blocks matter.
    """
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(
            f"mask is {list(mask.shape)}, tokens are {list(tokens.shape)}; expected the same shape"
        )
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    # Only padding in front moves a row; a hole inside it keeps its place (LLaDA counts 0..L-1).
    ahead = (real.long().cumsum(1) == 0).sum(1, keepdim=True)
    index = torch.arange(tokens.shape[1], device=tokens.device)
    positions = (index - ahead).clamp(min=0)
    none = torch.zeros_like(tokens)  # all of it is prompt, made of tokens
    level = levels(none, none, positions, none, attention, block_size)
    return Sequence(tokens, none, none, real, positions, level)
