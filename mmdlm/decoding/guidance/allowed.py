"""What may stand where in the answer."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy

MISFIT = 1e4  # nats that one written token against an option costs it
LEAST = -1e3  # log probability of a forbidden token, so that options with one keep an order


@dataclass(frozen=True)
class Slot:
    """Answer positions, and the tokens that may stand there.

    Args:
        start: first position; 0 is the first of the answer.
        stop: position after the last.
        ids: tokens that may stand there; None: all.
        first: tokens that may stand at the first position; None: `ids`.
        rest: token that stands for all others: it gets the probability of every token outside
            `ids`, except at the first position, and fills what is behind one of `ends`. None: there
            is none, and other tokens are forbidden.
        ends: tokens behind which only `rest` stands.
        optional: the first position may hold `rest` too.
    """

    start: int
    stop: int
    ids: Items[int] | None = None
    first: Items[int] | None = None
    rest: int | None = None
    ends: Items[int] = ()
    optional: bool = False

    def __post_init__(self) -> None:
        for name in ("ids", "first", "ends"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if not 0 <= self.start < self.stop:
            raise ValueError(f"slot [{self.start}, {self.stop}) is empty or before the answer")
        if self.rest is None and (self.ends or self.optional):
            raise ValueError("a slot that may end early needs rest=, the token that fills it up")


@dataclass(frozen=True)
class Choice:
    """Answer positions that hold one of several texts.

    Args:
        start: first position; 0 is the first of the answer.
        options: token ids of each text.
        rest: token that completes the shorter ones to the longest.
    """

    start: int
    options: Items[Items[int]]
    rest: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(map(tuple, self.options)))
        if self.start < 0 or not self.options or not all(self.options):
            raise ValueError(f"options are {self.options!r}, expected one text or more, none empty")

    @property
    def stop(self) -> int:
        """Position after the last."""
        return self.start + max(map(len, self.options))


@dataclass(frozen=True)
class Allowed(Strategy):
    """Lets only certain tokens stand at certain positions of the answer; without slots, all.

    Of a `Choice` the likeliest option is offered: by the mean log probability of its tokens that
    are still to be written, among the options that agree with those that are. Its tokens get the
    probability of the option, so a doubtful choice waits for what else is written. Give it last,
    so that no other guidance brings back what it forbids.

    Source: our own; Eric2i/dLLM-CtrlGen fixes the structure around slots and nothing inside them.

    Args:
        slots: `Slot` and `Choice`, none overlapping another.
    """

    excludes: ClassVar[tuple[str, ...]] = ("resize",)
    slots: Items[Slot | Choice] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", tuple(self.slots))

    def begin(self, state: DecodeState) -> None:
        """Checks the slots and turns them into tables.

        Raises:
            ValueError: slots overlap, leave the canvas or name ids that are not in the vocabulary,
                or the decode has `columns`.
        """
        if not self.slots:
            return
        if state.columns is not None:
            raise ValueError("Allowed and columns= both say what may be written; keep one")
        size, at = state.length - state.prompt, 0
        for slot in sorted(self.slots, key=lambda s: s.start):
            if slot.start < at or slot.stop > size:
                raise ValueError(
                    f"Allowed has a slot [{slot.start}, {slot.stop}), expected one within "
                    f"[{at}, {size}): behind the slot before it, and inside the answer"
                )
            at = slot.stop
        state.memory[self] = _tables(self.slots, state)

    def guide(self, state: DecodeState, logits: Tensor) -> Tensor:
        """[B R V] with -inf at what may not stand there."""
        tables = state.memory.get(self)
        if tables is None:
            return logits
        # The mask token is no part of what `rest` stands for.
        logits = _limit(tables, state, state.ban_mask(logits))
        for start, options, own in tables.choices:
            first, last = state.prompt + start, state.prompt + start + options.shape[1]
            if first < state.read.stop and state.read.start < last:
                logits = _choose(state, logits, start, options, own)
        return logits


@dataclass(frozen=True)
class _Tables:
    """Slots by answer position; number 0 of every table is for positions without a limit.

    Args:
        start: [G] first position of the slot each position is in.
        rule: [G] row of `allowed` and `rest`.
        allowed: [K V] bool.
        rest: [K] id that stands for the others, -1 for none.
        ending: [G] row of `ends`.
        ends: [E V] bool, tokens behind which `filler` stands.
        filler: [G] id.
        choices: (start, options [O n] completed with the filler, [O n] bool what is their own).
    """

    start: Tensor
    rule: Tensor
    allowed: Tensor
    rest: Tensor
    ending: Tensor
    ends: Tensor
    filler: Tensor
    choices: list[tuple[int, Tensor, Tensor]]


def _tables(slots: Items[Slot | Choice], state: DecodeState) -> _Tables:
    device, size = state.tokens.device, state.length - state.prompt
    start, filler = torch.arange(size), torch.zeros(size, dtype=torch.long)
    rule, ending = torch.zeros_like(filler), torch.zeros_like(filler)
    rules: dict[tuple[Items[int] | None, int], int] = {(None, -1): 0}
    endings: dict[Items[int], int] = {(): 0}
    choices = []
    for slot in slots:
        if isinstance(slot, Choice):
            width = slot.stop - slot.start
            rows = [[*option, *[slot.rest] * (width - len(option))] for option in slot.options]
            own = [[i < len(option) for i in range(width)] for option in slot.options]
            _check([slot.rest, *(i for row in rows for i in row)], state)
            options = torch.tensor(rows, device=device)
            choices.append((slot.start, options, torch.tensor(own, device=device)))
            continue
        span = slice(slot.start, slot.stop)
        rest = -1 if slot.rest is None else slot.rest
        head = (slot.ids if slot.first is None else slot.first), rest if slot.optional else -1
        body = slot.ids, -1 if slot.ids is None else rest
        start[span] = slot.start
        filler[span] = max(rest, 0)
        rule[span] = rules.setdefault(body, len(rules))
        rule[slot.start] = rules.setdefault(head, len(rules))
        ending[span] = endings.setdefault(slot.ends, len(endings))
    allowed = [_flags(ids, state, is_all=ids is None) for ids, _ in rules]
    ends = [_flags(ids, state) for ids in endings]
    rest = [number for _, number in rules]
    _check([*filler.tolist(), *(number for number in rest if number >= 0)], state)
    return _Tables(
        start.to(device),
        rule.to(device),
        torch.stack(allowed).to(device),
        torch.tensor(rest, device=device),
        ending.to(device),
        torch.stack(ends).to(device),
        filler.to(device),
        choices,
    )


def _flags(ids: Items[int] | None, state: DecodeState, is_all: bool = False) -> Tensor:
    """[V] bool, True for the ids."""
    found = torch.full((state.model.spec.transformer.vocab,), is_all)
    if ids:
        found[_check(ids, state)] = True
    return found


def _check(ids: Items[int], state: DecodeState) -> list[int]:
    """The ids, all of which can be written."""
    vocab, mask_id = state.model.spec.transformer.vocab, state.model.spec.mask_id
    wrong = next((i for i in ids if not 0 <= i < vocab or i == mask_id), None)
    if wrong is not None:
        raise ValueError(
            f"Allowed names id {wrong}; this model's ids are 0 to {vocab - 1}, and {mask_id} is "
            "the mask, which is never written"
        )
    return list(ids)


def _limit(tables: _Tables, state: DecodeState, logits: Tensor) -> Tensor:
    """[B R V] with the ids of the slots, and with the filler behind what ends one."""
    at = state.at - state.prompt
    answer = state.tokens[:, state.prompt :]
    row, entry = tables.rule[at].nonzero(as_tuple=True)
    if len(row):
        rule = tables.rule[at[row, entry]]
        scores, fits, rest = logits[row, entry], tables.allowed[rule], tables.rest[rule]
        others = scores.masked_fill(fits, -torch.inf).logsumexp(-1, keepdim=True)  # [N 1]
        scores = scores.masked_fill(~fits, -torch.inf)
        place = rest.clamp(min=0)[:, None]
        others = torch.where(rest[:, None] < 0, scores.gather(1, place), others)
        logits[row, entry] = scores.scatter(1, place, others)
    known = answer != state.model.spec.mask_id  # which the tables need not have
    hit = (tables.ends[tables.ending.expand_as(answer), answer * known] & known).long()  # [B G]
    before = hit.cumsum(1) - hit
    ended = before > before[:, tables.start]
    row, entry = ended.gather(1, at).nonzero(as_tuple=True)
    if len(row):
        logits[row, entry] = -torch.inf
        logits[row, entry, tables.filler[at[row, entry]]] = 0.0
    return logits


def _choose(state: DecodeState, logits: Tensor, start: int, options: Tensor, own: Tensor) -> Tensor:
    """[B R V] with the tokens of the likeliest option, and of its best rival, at a choice."""
    width = options.shape[1]
    batch = torch.arange(len(logits), device=logits.device)[:, None]
    # Which read entry, if any, is about a position of the choice.
    entry = torch.full_like(state.tokens[:, state.prompt :], -1)
    real = torch.ones_like(state.at, dtype=torch.bool) if state.real is None else state.real
    numbers = torch.arange(state.at.shape[1], device=logits.device).expand_as(state.at)
    state.put(entry, real, numbers, state.prompt)
    entry = entry[:, start : start + width]  # [B n]
    is_read = entry >= 0
    known = state.tokens[:, state.prompt + start : state.prompt + start + width]
    masked = known == state.model.spec.mask_id
    logp = logits[batch, entry.clamp(min=0)].log_softmax(-1)  # [B n V]
    each = logp.gather(2, options.T.expand(len(logits), -1, -1)).transpose(1, 2)  # [B O n]
    counted = own & (masked & is_read)[:, None]
    misfits = ((known[:, None] != options) & ~masked[:, None]).sum(-1)
    total = each.clamp(min=LEAST).masked_fill(~counted, 0).sum(-1)
    score = total / counted.sum(-1).clamp(min=1) - MISFIT * misfits  # [B O]
    best = score.argmax(-1)
    sure = score.log_softmax(-1).gather(1, best[:, None])  # [B 1]
    winner = options[best]  # [B n]
    rivals = score[..., None].masked_fill(options == winner[:, None], -torch.inf)  # [B O n]
    second, which = rivals.max(1)
    rival = options[which, torch.arange(width, device=logits.device)]
    doubt = (-sure.expm1()).log().minimum(sure - 1e-3).expand_as(second)
    doubt = doubt.masked_fill(second == -torch.inf, -torch.inf)
    row, place = is_read.nonzero(as_tuple=True)
    at = entry[row, place]
    logits[row, at] = -torch.inf
    logits[row, at, rival[row, place]] = doubt[row, place]
    logits[row, at, winner[row, place]] = sure.expand_as(second)[row, place]
    return logits
