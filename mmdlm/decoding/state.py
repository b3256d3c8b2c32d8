"""The rows of a running batch: what the loop knows and writes, and their random streams."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmdlm.backbones.kv import KV, listed, take
from mmdlm.decoding.look import Look
from mmdlm.decoding.memory import Memory
from mmdlm.decoding.refresh import Refresh, Shown
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM

CLOCKS = ("step", "block", "block_step", "block_masks", "block_size", "forwards", "asked", "final")


def _nothing() -> Tensor:
    return torch.zeros(0)


class Streams:
    """The random streams of rows that were added together; seeded when the first number is drawn.

    Args:
        source: see `Source`; with one generator, row i is seeded by its i-th draw.
        batch: number of rows.
        device: where the streams draw.
    Raises:
        ValueError: there are more or fewer generators than rows.
    """

    def __init__(self, source: Source, batch: int, device: torch.device) -> None:
        if isinstance(source, Items) and len(source) != batch:
            raise ValueError(f"generator: {len(source)} for {batch} rows; give one, or one per row")
        self.source, self.batch, self.device = source, batch, device
        self.made: list[torch.Generator] | None = None

    @classmethod
    def of(cls, source: Source, batch: int, device: torch.device) -> Streams:
        """The streams of a source; its own if it is streams already."""
        return source if isinstance(source, Streams) else cls(source, batch, device)

    @classmethod
    def exactly(cls, generators: Items[torch.Generator]) -> Streams:
        """Rows that draw from these generators themselves, one per row, in the published order."""
        made = cls(generators, len(generators), generators[0].device)
        made.made = list(generators)
        return made

    def copied(self, row: int) -> Streams:
        """A stream for one row, with the numbers that this row draws from now on."""
        one = self[row]
        same = torch.Generator(one.device)
        same.set_state(one.get_state())
        return self.exactly([same])

    def __getitem__(self, row: int) -> torch.Generator:
        if self.made is None:
            self.made = streams(self.source, self.batch, self.device)
        return self.made[row]


Source = torch.Generator | Items[torch.Generator] | Streams | None
"""One generator for the rows, one per row, their streams, or torch's own generator."""


def streams(source: Source, batch: int, device: torch.device) -> list[torch.Generator]:
    """One random stream per row, each seeded by one draw from the source.

    Args:
        source: see `Source`; with one generator, row i is seeded by its i-th draw.
        batch: number of rows.
        device: where the streams draw.
    """
    if source is None or isinstance(source, torch.Generator):
        place = "cpu" if source is None else source.device
        seeds = torch.randint(2**62, (batch,), generator=source, device=place).tolist()
    else:
        seeds = [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in source]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


@dataclass
class State:
    """Rows that are being decoded; strategies read it through a `View`, only the loop writes it.

    B counts the rows, L the positions of the padded canvas: prompts [0, P), padded on the left, and
    answers [P, L), padded on the right; G = L - P. "Host" tensors are on the CPU.

    Args:
        model: the model that runs.
        sequence: prompts and answers; `tokens` is rewritten in place.
        prompt: P.
        keys: [B] names of the rows.
        draws: [B] random stream of each row, and its number there.
        columns: ids that may be committed; None for the whole vocabulary.
    """

    model: MultimodalDLM
    sequence: Sequence
    prompt: int
    keys: list[int]
    draws: list[tuple[Streams, int]]
    columns: slice | None = None

    asked: Tensor = field(init=False)
    """[B] host int64, initial length of each answer; `steps` settings are relative to it."""
    step: Tensor = field(init=False)
    """[B] host int64, steps each row has done."""
    block: Tensor = field(init=False)
    """[B] host int64, index of each row's block."""
    block_step: Tensor = field(init=False)
    """[B] host int64, steps each row has done in its block."""
    block_masks: Tensor = field(init=False)
    """[B] host int64, masks in each row's block when it opened."""
    block_size: Tensor = field(init=False)
    """[B] host int64, positions of a full block like each row's."""
    forwards: Tensor = field(init=False)
    """[B] host int64, forwards of the backbone in which each row took part."""
    final: Tensor = field(init=False)
    """[B] host int64: keys and values of lower levels are cached and can no longer change."""
    has_cache: Tensor = field(init=False)
    """[B] host bool, rows of which keys and values of all positions are cached."""
    resized: Tensor = field(init=False)
    """[B] host bool, rows whose answer changed its length in the latest step."""
    plan: Tensor = field(init=False)
    """[B L] host bool, the open positions of each row, committed or not."""
    region: Tensor = field(init=False)
    """[B L] host bool, `plan` and what belongs to the same block in the prompt."""
    opened: Tensor = field(init=False)
    """[B L] bool, `plan` on the device."""
    held: Tensor = field(init=False)
    """[B L] host bool, written positions that keep their block open, see `Strategy.hold`."""
    level: Tensor = field(init=False)
    """[B L] host int64, the level of each position (see `mmdlm.layout`); -1 at padding."""
    answer: Tensor = field(init=False)
    """[B L] host bool, the positions of each answer, without padding."""
    flat: bool = True
    """All positions of all rows are of one level, and nothing is padding."""
    one_level: bool = True
    """All real positions of a row are of one level: nothing is ever final."""
    writable: Tensor = field(init=False)
    """[B L] bool, answer positions that were masks at first: all that may be revised or edited."""
    commit_step: Tensor = field(init=False)
    """[B G] int64, step of the row that filled a position, -1 for none."""
    commit_confidence: Tensor = field(init=False)
    """[B G] float32, probability of a token when it was committed."""
    calls: int = 0
    """Forwards of the backbone for all rows together."""

    refresh: Refresh | None = None
    """What this step computes."""
    shown: Shown | None = None
    """The answers that the model reads in this step; None: those of `tokens`."""
    look: Look | None = None
    """What the layers of this step leave out."""
    parts: list[Any] = field(default_factory=list)
    """The forwards of this step, see `mmdlm.decoding.forward`."""
    at: Tensor = field(default_factory=_nothing)
    """[B R] int64, the canvas positions this step scores, ascending in every row: all [B R] tensors
    below are about these. Rows with fewer of them repeat one, see `real`."""
    read: slice | None = None
    """The scored positions where they are the same stretch in all rows."""
    real: Tensor | None = None
    """[B R] bool, False where `at` repeats a position to be as long as in other rows; None where
    no row does."""
    open: Tensor = field(default_factory=_nothing)
    """[B R] bool, scored positions that are masked and open: those that may commit."""
    candidates: Tensor = field(default_factory=_nothing)
    """[B R] int64 candidate ids."""
    log_odds: Tensor = field(default_factory=_nothing)
    """[B R] float32 log p/(1-p) of the candidates: keeps the float64 order where p rounds to 1."""
    confidence: Tensor = field(default_factory=_nothing)
    """[B R] float32 ranking of the candidates; -inf where nothing may commit."""
    taken: Tensor = field(default_factory=_nothing)
    """[B R] bool, positions the current step committed."""

    caches: dict[str, KV] = field(default_factory=dict)
    """Key/value buffers by the filling of the canvas they belong to, see `forward`."""
    memories: dict[int, Memory] = field(default_factory=dict)
    """What strategies remember, by `id` of the strategy."""
    alternatives: dict[str, State] = field(default_factory=dict)
    """The same answers after other prompts, by name, for guidance; as long as this one. Each has
    a layout, caches, `refresh` and `look` of its own, and of strategies' memories only those of the
    owners of `refresh` and `look`; all else is that of these rows."""
    noted: dict[Any, Any] = field(default_factory=dict)
    """What was derived from plan and levels, until these or the rows change; see `View.derived`."""
    left_before: Tensor = field(init=False)
    """[B L] host bool, `left` as of the latest device-to-host copy. Only commits have happened
    since: it holds all of `left`."""
    _left: Tensor | None = None

    def __post_init__(self) -> None:
        batch, length = self.tokens.shape
        device, answer = self.tokens.device, (batch, length - self.prompt)
        for name in CLOCKS:
            setattr(self, name, torch.zeros(batch, dtype=torch.int64))
        self.block -= 1
        self.asked += length - self.prompt
        self.has_cache = torch.zeros(batch, dtype=torch.bool)
        self.resized = self.has_cache
        self.commit_step = torch.full(answer, -1, device=device)
        self.commit_confidence = torch.zeros(answer, device=device)
        self.plan = torch.zeros(batch, length, dtype=torch.bool)
        self.held = self.left_before = self.region = self.plan
        self.opened = self.plan.to(device)
        self.set_levels(self.sequence.level)
        self.writable = self.masked

    @property
    def tokens(self) -> Tensor:
        """[B L] int64 current ids."""
        return self.sequence.tokens

    @property
    def prompts(self) -> tuple[State, ...]:
        """The rows after each of their prompts, first after their own."""
        return (self, *self.alternatives.values())

    @property
    def length(self) -> int:
        """L."""
        return self.tokens.shape[1]

    @property
    def score_masked_only(self) -> bool:
        """Only masks go through the head, which with a large vocabulary costs as much as the rest.

        Not on a GPU: there it costs the reading of its weights, and shapes had better not vary.
        """
        return self.tokens.device.type == "cpu"

    @property
    def masked(self) -> Tensor:
        """[B L] bool, answer positions still to be filled; masks inside the prompt never count."""
        masked = self.tokens == self.model.spec.mask_id
        masked.narrow(1, 0, self.prompt).zero_()
        return masked

    @property
    def left(self) -> Tensor:
        """[B L] host bool, `masked` and what is held.

        The first access after a write copies it from the device, which waits for it.
        """
        if self._left is None:
            masked = self.masked.cpu()
            self.held = self.held & ~masked
            self._left = self.left_before = masked | self.held
        return self._left

    @property
    def lengths(self) -> Tensor:
        """[B] host int64, positions of each answer, which may be shorter than the canvas."""
        return (self.level[:, self.prompt :] >= 0).sum(1)

    @property
    def even(self) -> bool:
        """The answer is of one level in every row."""
        level = self.level[:, self.prompt :]
        return bool(((level == level[:, :1]) | (level < 0)).all())

    @property
    def unsettled(self) -> Tensor:
        """[B L] host bool, positions of each row that see one of its masks, or a held position."""
        first = self.left.int().argmax(1, keepdim=True)
        return self.level >= self.level.gather(1, first)

    def set_levels(self, level: Tensor) -> None:
        """Sets the level of each position, [B L] int64 (see `mmdlm.layout`)."""
        self.sequence = replace(self.sequence, level=level)
        self.level = level.cpu().masked_fill(~self.sequence.mask.cpu(), -1)
        self.relevel()

    def close(self, start: Tensor) -> None:
        """Makes text of finished canvases, whose keys and values are then computed again.

        Args:
            start: [B 1] host int64, where the open canvas of each row begins.
        """
        done = self.answer & (torch.arange(self.length) < start)
        text = 2 * self.sequence.positions.cpu()
        changed = done & (self.level != text)
        if bool(changed.any()):
            lowest = text.masked_fill(~changed, 2**62).amin(1)
            self.final = torch.minimum(self.final, lowest)
            self.set_levels(torch.where(changed, text, self.level).to(self.tokens.device))

    def relevel(self) -> None:
        """Called after `level` has changed."""
        self.noted = {}
        level = self.level
        self.answer = level >= 0
        self.answer[:, : self.prompt] = False
        highest = level.amax(1)
        self.flat = bool((level == highest[:1]).all())
        lowest = level.masked_fill(level < 0, 2**62).amin(1)
        self.one_level = bool((lowest >= highest).all())

    def wrote(self) -> None:
        """Called after every write: the host copies are out of date."""
        self._left = None

    def here(self, values: Tensor) -> Tensor:
        """[B R] of flags [B L], at the scored positions; False where one is repeated."""
        if self.read is not None:
            return values[:, self.read]
        here = take(values, self.at)
        return here if self.real is None else here & self.real

    def focus(self, read: slice | Tensor) -> None:
        """Sets the positions this step scores, and which of them may commit.

        Args:
            read: the same positions of all rows, or [B L] host bool.
        """
        masked = self.tokens == self.model.spec.mask_id
        at = None
        if not isinstance(read, slice):
            columns = read[0] if len(read) == 1 else read.any(0)
            at = columns.nonzero()[:, 0]
            first, last = (int(at[0]), int(at[-1])) if len(at) else (0, -1)
            stretch = slice(first, last + 1)
            is_stretch = last - first + 1 == len(at) > 0
            if is_stretch and (len(read) == 1 or bool(read[:, stretch].all())):
                read = stretch
        self.real = None
        if isinstance(read, slice):
            self.read = read
            span = torch.arange(read.start, read.stop, device=self.tokens.device)
            self.at = span.expand(len(self.tokens), -1)
            self.open = (masked & self.opened)[:, read]
            return
        self.read = None
        if len(read) == 1 and len(at):
            self.at = at[None].to(self.tokens.device)
            self.open = take(masked & self.opened, self.at)
            return
        none = ~read.any(1)
        at, real = listed(read)
        if bool(none.any()):  # rows that score nothing, but compute something
            real = real & ~none[:, None]
            shift = int(self.model.spec.shift)
            first = self.refresh.compute.int().argmax(1, keepdim=True) + shift
            at = torch.where(none[:, None], first.clamp(max=self.length - 1), at)
        self.at = at.to(self.tokens.device)
        self.real = real.to(self.tokens.device)
        self.open = self.here(masked & self.opened)

    def put(self, target: Tensor, where: Tensor, values: Tensor | float, start: int = 0) -> None:
        """Writes values at some of the scored positions.

        Args:
            target: [B N], changed in place.
            where: [B R] bool, where to write.
            values: [B R], [B 1], or one for all.
            start: canvas position of the first column of `target`.
        """
        if self.read is not None:
            part = target.narrow(1, self.read.start - start, self.read.stop - self.read.start)
            part.copy_(torch.where(where, values, part))
            return
        place = self.at - start if start else self.at
        if self.real is None:
            now = target.gather(1, place)
            target.scatter_(1, place, torch.where(where, values, now))
            return
        # All that is not written goes to a spare column: a repeated position must not write.
        spare = torch.cat([target, target[:, :1]], 1)
        place = torch.where(where, place, target.shape[1])
        values = torch.as_tensor(values, device=target.device, dtype=target.dtype)
        spare.scatter_(1, place, values.expand(place.shape))
        target.copy_(spare[:, :-1])
