"""Constrained decoding: which tokens are allowed at which positions of the answer."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.checks import Checked, LengthAtLeast, NonNegativeInt, PositiveInt
from mmdlm.backbones.family import Spec
from mmdlm.decoding.memory import Entry
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.model import MultimodalDLM

MISFIT = 1e4  # nats subtracted from an option per written token that differs from it
LEAST = -1e3  # log probability of a forbidden token: options that hold one can still be compared
Text = Annotated[tuple[int, ...], LengthAtLeast(1)]  # token ids


@dataclass(frozen=True)
class Slot(Checked):
    """Answer positions, and the tokens that may be written there.

    Args:
        start: first position; 0 is the first of the answer.
        stop: position after the last.
        ids: allowed tokens; None: all.
        first: tokens allowed at the first position; None: `ids`.
        rest: token that replaces all others: it gets the probability of every token outside `ids`,
            except at the first position, and fills the slot after one of `ends`. None: there is
            none, and other tokens are forbidden.
        ends: tokens after which only `rest` is allowed.
        optional: `rest` is allowed at the first position too.
    """

    start: NonNegativeInt
    stop: PositiveInt
    ids: tuple[int, ...] | None = None
    first: tuple[int, ...] | None = None
    rest: int | None = None
    ends: tuple[int, ...] = ()
    optional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start >= self.stop:
            raise ValueError(f"slot [{self.start}, {self.stop}) is empty, expected start < stop")
        if self.rest is None and (self.ends or self.optional):
            raise ValueError("a slot that may end early needs rest=, the token that fills it")


@dataclass(frozen=True)
class Choice(Checked):
    """Answer positions that hold one of several texts.

    Args:
        start: first position; 0 is the first of the answer.
        options: token ids of each text.
        rest: token that pads the shorter ones to the longest.
    """

    start: NonNegativeInt
    options: Annotated[tuple[Text, ...], LengthAtLeast(1)]
    rest: int

    @property
    def stop(self) -> int:
        """Position after the last."""
        return self.start + max(map(len, self.options))


@dataclass(frozen=True)
class Allowed(Strategy):
    """Constrained decoding: allows only certain tokens at certain positions of the answer.

    Of a `Choice` the most probable option is offered: that of the highest mean log probability of
    its tokens still to be written, among the options that agree with the written ones. Its tokens
    get the probability of the option, so an uncertain choice is committed late. Put it last, so
    that no other guidance undoes its restrictions.

    Source: ours; Eric2i/dLLM-CtrlGen fixes the structure around slots and nothing inside them.

    Args:
        slots: `Slot` and `Choice`, none overlapping another; without any, all tokens are allowed.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"fixed_length"})

    slots: tuple[Slot | Choice, ...] = ()

    def prepare(self, model: MultimodalDLM, columns: slice | None) -> dict[str, Any]:
        """Makes tables of the slots.

        Raises:
            ValueError: a slot has ids that are not in the vocabulary, or the decode has `columns`.
        """
        if not self.slots:
            return {"tables": None}
        if columns is not None:
            raise ValueError("Allowed and columns= both restrict what may be written; keep one")
        return {"tables": _tables(self.slots, model.spec, model.device)}

    def begin(self, view: View) -> dict[str, Entry]:
        """Checks the slots against the length of the answer.

        Raises:
            ValueError: slots overlap, or are not inside the answer.
        """
        size, at = view.length - view.prompt, 0
        for slot in sorted(self.slots, key=lambda s: s.start):
            if slot.start < at or slot.stop > size:
                raise ValueError(
                    f"Allowed has a slot [{slot.start}, {slot.stop}), expected one within "
                    f"[{at}, {size}): after the slot before it, and inside the answer"
                )
            at = slot.stop
        return {}

    def guide(self, view: View, logits: Tensor) -> Tensor:
        """[B R V] with -inf at forbidden tokens, changed in place."""
        tables = view.memory(self)["tables"]
        if tables is None:
            return logits
        # `rest` does not get the probability of the mask token.
        logits = _limit(tables, view, view.ban_mask(logits))
        for start, options, own in tables.choices:
            first, last = view.prompt + start, view.prompt + start + options.shape[1]
            if view.read is None or (first < view.read.stop and view.read.start < last):
                logits = _choose(view, logits, start, options, own)
        return logits


@dataclass(frozen=True)
class _Tables:
    """Slots by answer position, N of them up to the end of the last slot.

    Entry 0 of `allowed`, `rest` and `ends` is for positions without a restriction.

    Args:
        start: [N] first position of the slot each position is in.
        rule: [N + 1] index into `allowed` and `rest`; the last one is for all later positions.
        allowed: [K V] bool.
        rest: [K] id that replaces the others, -1 for none.
        ending: [N] index into `ends`.
        ends: [E V] bool, tokens after which only `filler` is allowed.
        filler: [N + 1] id.
        choices: (start, options [O n] padded with `rest`, [O n] bool, False at that padding).
    """

    start: Tensor
    rule: Tensor
    allowed: Tensor
    rest: Tensor
    ending: Tensor
    ends: Tensor
    filler: Tensor
    choices: list[tuple[int, Tensor, Tensor]]


def _tables(slots: Items[Slot | Choice], spec: Spec, device: torch.device) -> _Tables:
    size = max(slot.stop for slot in slots)
    start, filler = torch.arange(size), torch.zeros(size + 1, dtype=torch.long)
    rule, ending = torch.zeros_like(filler), torch.zeros_like(start)
    rules: dict[tuple[Items[int] | None, int], int] = {(None, -1): 0}
    endings: dict[Items[int], int] = {(): 0}
    choices = []
    for slot in slots:
        if isinstance(slot, Choice):
            width = slot.stop - slot.start
            rows = [[*option, *[slot.rest] * (width - len(option))] for option in slot.options]
            own = [[i < len(option) for i in range(width)] for option in slot.options]
            _check([slot.rest, *(i for row in rows for i in row)], spec)
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
    allowed = [_flags(ids, spec, is_all=ids is None) for ids, _ in rules]
    ends = [_flags(ids, spec) for ids in endings]
    rest = [number for _, number in rules]
    _check([*filler.tolist(), *(number for number in rest if number >= 0)], spec)
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


def _flags(ids: Items[int] | None, spec: Spec, is_all: bool = False) -> Tensor:
    """[V] bool, True for the ids."""
    found = torch.full((spec.transformer.vocab,), is_all)
    if ids:
        found[_check(ids, spec)] = True
    return found


def _check(ids: Items[int], spec: Spec) -> list[int]:
    """The ids, all of which can be written."""
    vocab, mask_id = spec.transformer.vocab, spec.mask_id
    wrong = next((i for i in ids if not 0 <= i < vocab or i == mask_id), None)
    if wrong is not None:
        raise ValueError(
            f"Allowed names id {wrong}; this model's ids are 0 to {vocab - 1}, and {mask_id} is "
            "the mask, which is never written"
        )
    return list(ids)


def _limit(tables: _Tables, view: View, logits: Tensor) -> Tensor:
    """[B R V] with the ids of the slots only, and with the filler after a token that ends one."""
    size = len(tables.start)
    at = (view.at - view.prompt).clamp(max=size)
    answer = view.tokens[:, view.prompt : view.prompt + size]
    row, entry = tables.rule[at].nonzero(as_tuple=True)
    if len(row):
        rule = tables.rule[at[row, entry]]
        scores, fits, rest = logits[row, entry], tables.allowed[rule], tables.rest[rule]
        others = scores.masked_fill(fits, -torch.inf).logsumexp(-1, keepdim=True)  # [N 1]
        scores = scores.masked_fill(~fits, -torch.inf)
        place = rest.clamp(min=0)[:, None]
        others = torch.where(rest[:, None] < 0, scores.gather(1, place), others)
        logits[row, entry] = scores.scatter(1, place, others)
    known = answer != view.model.spec.mask_id  # which may be outside the vocabulary
    hit = (tables.ends[tables.ending.expand_as(answer), answer * known] & known).long()  # [B G]
    before = hit.cumsum(1) - hit
    ended = F.pad(before > before[:, tables.start], (0, 1))
    row, entry = ended.gather(1, at).nonzero(as_tuple=True)
    if len(row):
        logits[row, entry] = -torch.inf
        logits[row, entry, tables.filler[at[row, entry]]] = 0.0
    return logits


def _choose(view: View, logits: Tensor, start: int, options: Tensor, own: Tensor) -> Tensor:
    """[B R V] with the tokens of the most probable option, and of the next best, at a choice."""
    width = options.shape[1]
    batch = torch.arange(len(logits), device=logits.device)[:, None]
    # Index of the scored position, if any, for each position of the choice.
    entry = torch.full_like(view.tokens[:, view.prompt :], -1)
    real = view.here(torch.ones_like(view.masked))
    numbers = torch.arange(view.at.shape[1], device=logits.device).expand_as(view.at)
    entry = view.placed(entry, real, numbers, view.prompt)
    entry = entry[:, start : start + width]  # [B n]
    is_read = entry >= 0
    known = view.tokens[:, view.prompt + start : view.prompt + start + width]
    masked = known == view.model.spec.mask_id
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
