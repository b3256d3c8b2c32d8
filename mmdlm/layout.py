"""Sequence layout of text, media and answers, and the attention mask.

Attention is described by one integer per token, its level: a query attends to all keys whose level
is not above its own. Full attention has one level; prefix attention has two (prompt, answer);
block-causal attention has one per block; autoregression has one per token. Keys below a query's
level never depend on that query, so they can be cached.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from encoders.features import Prepared, Sparse
from mmdlm.backbones.family import Spec

PROMPT, ANSWER = 0, 1
"""Roles of a position: given, or to be generated."""
TOKEN, MEDIUM = 0, 1
"""Sources of a position's embedding: the token table, or an encoder."""
Attention = Literal["full", "prefix", "cascade", "block_causal", "canvas"]
"""full: bidirectional attention. prefix: the prompt does not attend to the answer. cascade: media
attend to media, the prompt text to media and text, the answer to all. block_causal: tokens attend
to the same and earlier blocks. canvas: text is causal, an image attends to itself too; a block of
the answer (odd level) attends to itself and all before it, and becomes text when it is finished.
With a block size, the answer of prefix and cascade is block-causal."""


Part = Tensor | Prepared | Sparse
"""Token ids int64 [n], embeddings float [n D], some of them, or a preprocessed item."""


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
        """Parts of the prompt."""
        return (self.prompt,) if isinstance(self.prompt, Tensor) else tuple(self.prompt)


@dataclass(frozen=True)
class Row:
    """One batch row before layout.

    Args:
        parts: parts shared by all turns, in order: token ids int64 [n], embeddings float [n D], or
            a preprocessed item, which `MultimodalDLM.embed` replaces by its embeddings.
        turns: prompts with answers. Turns attend to the shared parts but not to each other, so that
            an image is encoded once for several questions. Only media can be shared, and only
            with cascade attention.
    """

    parts: tuple[Part, ...]
    turns: tuple[Turn, ...] = ()

    @property
    def items(self) -> list[Prepared]:
        """Preprocessed items of the row, in order."""
        parts = (*self.parts, *(part for turn in self.turns for part in turn.parts))
        return [part for part in parts if isinstance(part, Prepared)]

    @property
    def ids(self) -> list[Tensor]:
        """Token ids of the row, in order, those of the answers included."""
        turns = (part for turn in self.turns for part in (*turn.parts, turn.answer))
        parts = (*self.parts, *turns)
        return [p for p in parts if isinstance(p, Tensor) and not p.is_floating_point()]

    @property
    def length(self) -> int:
        """Positions of the row, whose items are encoded."""
        turns = (part for turn in self.turns for part in (*turn.parts, turn.answer))
        return sum(len(part) for part in (*self.parts, *turns))

    def map(self, change: Callable[[Prepared], Tensor | Sparse]) -> Row:
        """The row with every preprocessed item replaced by its embeddings.

        Args:
            change: maps an item to its embeddings [N D], or some of them.
        """

        def changed(parts: Items[Part]) -> tuple[Part, ...]:
            return tuple(change(part) if isinstance(part, Prepared) else part for part in parts)

        turns = tuple(Turn(changed(turn.parts), turn.answer) for turn in self.turns)
        return Row(changed(self.parts), turns)

    def without_answers(self) -> Row:
        """The row without answers, as a prompt.

        Raises:
            ValueError: the row has several turns.
        """
        if len(self.turns) > 1:
            raise ValueError(
                f"the row has {len(self.turns)} turns, expected at most 1; decode them one by one"
            )
        return Row((*self.parts, *(part for turn in self.turns for part in turn.parts)))


@dataclass(frozen=True)
class Sequence:
    """A batch after layout, padded on the left; padding never changes the result of a row.

    Args:
        tokens: [B L] int64; media slots and padding hold the pad id.
        role: [B L] int64, PROMPT or ANSWER.
        source: [B L] int64, TOKEN or MEDIUM.
        mask: [B L] bool, True = real.
        positions: [B L] int64 rotary positions; each turn continues from the shared parts.
        level: [B L] int64, see the module docstring.
        branch: [B L] int64, 0 = shared, j = turn j; None if no row has more than one turn.
        media: [N D] embeddings of all media positions, in row-major order; None without media.
        soft: [B L D] expected embeddings of the previous step (self-conditioning); None for zeros.
    """

    tokens: Tensor
    role: Tensor
    source: Tensor
    mask: Tensor
    positions: Tensor
    level: Tensor
    branch: Tensor | None = None
    media: Tensor | None = field(default=None, repr=False)
    soft: Tensor | None = field(default=None, repr=False)

    @property
    def is_answer(self) -> Tensor:
        """[B L] bool, True at answer positions, False at padding."""
        return (self.role == ANSWER) & self.mask

    @property
    def is_medium(self) -> Tensor:
        """[B L] bool, True at positions whose embedding comes from an encoder."""
        return self.source == MEDIUM

    def to(self, device: torch.device | str) -> Sequence:
        """The sequence on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def with_tokens(self, tokens: Tensor) -> Sequence:
        """The layout with other tokens [B L]."""
        return replace(self, tokens=tokens)

    def visible(self) -> Tensor | None:
        """Attention mask [B L L] bool, True = attend; None if every query attends to every key."""
        return visible(self.level, self.level, self.mask, self.branch, self.branch)


def chosen(sequence: Sequence, rows: Tensor) -> Sequence:
    """Selected rows of a batch, with their media.

    Args:
        sequence: batch.
        rows: int64 [n] row indices on its device; repetitions are allowed.
    """
    media = sequence.media
    if media is not None:
        slots = sequence.source == MEDIUM
        number = (slots.flatten().cumsum(0) - 1).view_as(slots)[rows]
        media = media[number[slots[rows]]]
    tables = {n: x[rows] for n, x in vars(sequence).items() if x is not None and n != "media"}
    return replace(sequence, **tables, media=media)


def append_answer(spec: Spec, prompt: Sequence, answer: Tensor) -> Sequence:
    """A prompt followed by answer slots, whose positions continue after the last of each row.

    Args:
        spec: of the model, for the attention.
        prompt: B rows of P slots; what is not real may be anywhere in them.
        answer: [B G] int64 ids of the answer slots, on the same device.
    """
    order = torch.arange(answer.shape[1], device=answer.device).expand_as(answer)
    role, source = torch.full_like(order, ANSWER), torch.full_like(order, TOKEN)
    positions = ((prompt.positions + 1) * prompt.mask).amax(1, keepdim=True) + order
    level = levels(role, source, positions, order, spec.attention, spec.block_size)
    own = Sequence(answer, role, source, torch.ones_like(order, dtype=torch.bool), positions, level)
    tables = {n: x for n, x in vars(own).items() if x is not None}
    whole = {n: torch.cat([getattr(prompt, n), x], 1) for n, x in tables.items()}
    return replace(prompt, **whole, branch=None)


def visible(
    query_level: Tensor,
    key_level: Tensor,
    key_mask: Tensor,
    query_branch: Tensor | None = None,
    key_branch: Tensor | None = None,
) -> Tensor | None:
    """Attention mask [B M L] bool, True = attend; None if every query attends to every key.

    Args:
        query_level: [B M] int64.
        key_level: [B L] int64.
        key_mask: [B L] bool, True = real.
        query_branch: [B M] int64; None without branches.
        key_branch: [B L] int64; None without branches.
    """
    unmasked = query_branch is None and bool(key_mask.all())
    if unmasked and bool(key_level.max() <= query_level.min()):
        return None
    seen = seen_by(query_level, key_level, key_mask)
    if query_branch is not None:
        is_same = key_branch[:, None] == query_branch[..., None]
        seen = seen & (is_same | (key_branch[:, None] == 0))
    return seen


def seen_by(query_level: Tensor, key_level: Tensor, key_mask: Tensor) -> Tensor:
    """Attention mask [B M L] bool without branches, True = attend; see `visible`."""
    return (key_level[:, None] <= query_level[..., None]) & key_mask[:, None]


def levels(
    role: Tensor,
    source: Tensor,
    positions: Tensor,
    order: Tensor,
    attention: Attention,
    block_size: int | None,
) -> Tensor:
    """Level of each token, int64 [B L].

    Args:
        role: [B L] PROMPT or ANSWER.
        source: [B L] TOKEN or MEDIUM.
        positions: [B L] int64.
        order: [B L] int64, index of each token within its answer; 0 elsewhere.
        attention: see `Attention`.
        block_size: tokens per block; None without blocks.
    Raises:
        ValueError: the attention is unknown, or block_causal has no block size.
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
            raise ValueError(
                "block_size is None, but block_causal attention needs the tokens per block"
            )
        return positions // block_size
    if attention == "canvas":
        last = positions - order % block_size + block_size - 1
        return torch.where(role == ANSWER, 2 * last + 1, causal(source, positions))
    raise ValueError(
        f"attention {attention!r} is unknown; expected full, prefix, cascade, block_causal or "
        "canvas"
    )


def causal(source: Tensor, positions: Tensor) -> Tensor:
    """Levels [B L] of text and images before a canvas: even, and those of an image are equal."""
    after = torch.cat([source[:, 1:], torch.zeros_like(source[:, :1])], 1)
    is_last = (source == TOKEN) | (after == TOKEN)
    ends = positions.masked_fill(~is_last, 2**60)
    return 2 * ends.flip(1).cummin(1).values.flip(1)


def arrange(
    rows: Items[Row], *, pad: int, attention: Attention = "full", block_size: int | None = None
) -> Sequence:
    """Left-padded batch of rows of any lengths; rows without parts are padding only.

    Args:
        rows: at least one row.
        pad: token id at padding and media positions.
        attention: see `Attention`.
        block_size: tokens per block; None without blocks.
    Raises:
        ValueError: there are no rows, or turns share parts they must not share.
    """
    if not rows:
        raise ValueError("arrange: got no rows, expected at least one")
    for row in rows:
        _check_shared(row, attention)
    media = [part for row in rows for part in _embeddings(row)]
    tables = [_lay(row, pad) for row in rows]
    length = max(row.shape[1] for row in tables)
    table = torch.zeros(len(rows), 7, length, dtype=torch.long)
    for i, row in enumerate(tables):
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
    """Raises ValueError if shared parts could attend to the prompts of several turns."""
    if len(row.turns) < 2 or not row.parts:
        return
    if attention != "cascade":
        raise ValueError(
            f"arrange: {len(row.turns)} turns share media, but with {attention} attention media "
            "attend to the prompts; use cascade attention or one row per turn"
        )
    if not all(map(_is_embedded, row.parts)):
        raise ValueError(
            f"arrange: {len(row.turns)} turns share text, which would attend to their prompts; put "
            "the text into each turn's prompt"
        )


def _embeddings(row: Row) -> list[Tensor]:
    """Embeddings [n D] of a row, in order."""
    parts = (*row.parts, *(part for turn in row.turns for part in turn.parts))
    items = [part for part in parts if isinstance(part, Prepared)]
    if items:
        raise TypeError(f"arrange: {items[0].kind} is not encoded yet; use MultimodalDLM.embed")
    return [getattr(part, "tokens", part) for part in parts if _is_embedded(part)]


def _is_embedded(part: Tensor | Sparse) -> bool:
    """Whether a part is embeddings, not token ids."""
    return isinstance(part, Sparse) or part.is_floating_point()


def _lay(row: Row, pad: int) -> Tensor:
    """Table of one row, int64 [7 n]: token, role, source, mask, position, order, branch."""
    spans = []

    def span(part: Tensor | Sparse, role: int, start: int, branch: int) -> int:
        source = MEDIUM if _is_embedded(part) else TOKEN
        n = part.places.cpu() if isinstance(part, Sparse) else torch.arange(len(part))
        ones = torch.ones_like(n)
        ids = pad * ones if source == MEDIUM else part
        order = n if role == ANSWER else 0 * n
        spans.append(
            torch.stack([ids, role * ones, source * ones, ones, start + n, order, branch * ones])
        )
        return start + (part.span if isinstance(part, Sparse) else len(part))

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
        block_size: tokens per block; None without blocks.
    Raises:
        ValueError: the shapes of mask and tokens differ.
    """
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(
            f"mask is {list(mask.shape)}, tokens are {list(tokens.shape)}; expected the same shape"
        )
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    # Only left padding shifts positions; masked positions inside a row count (as in LLaDA).
    padding = (real.long().cumsum(1) == 0).sum(1, keepdim=True)
    index = torch.arange(tokens.shape[1], device=tokens.device)
    positions = (index - padding).clamp(min=0)
    zeros = torch.zeros_like(tokens)  # role PROMPT, source TOKEN, order 0
    level = levels(zeros, zeros, positions, zeros, attention, block_size)
    return Sequence(tokens, zeros, zeros, real, positions, level)
