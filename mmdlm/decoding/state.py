"""What a run of the denoising loop knows."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmdlm.backbones.kv import KV, Held, Rows, listed, take
from mmdlm.decoding.rng import Source, streams
from mmdlm.decoding.strategy import Refresh, Window
from mmdlm.layout import Sequence, chosen, seen_by
from mmdlm.model import MultimodalDLM


def _nothing() -> Tensor:
    return torch.zeros(0)


@dataclass
class DecodeState:
    """One batch being decoded; strategies read it, the loop writes it.

    B counts the rows that are not finished yet; `rows` says which rows of the caller they are.

    Args:
        model: the model that runs.
        sequence: prompt and canvas, left-padded; `tokens` is rewritten in place.
        prompt: length P of the padded prompt; the canvas is [P, L).
        source: where random draws come from.
        columns: ids that may be committed; None for the whole vocabulary.
    """

    NEW: ClassVar[int] = -1
    EOS: ClassVar[int] = -2
    GONE: ClassVar[int] = -3
    """What may stand at a position of a resized canvas, see `Strategy.resize`."""

    model: MultimodalDLM
    sequence: Sequence
    prompt: int
    source: Source = None
    columns: slice | None = None

    batch: int = field(init=False)
    """Rows of the caller's batch."""
    asked: int = field(init=False)
    """Positions of the answer at first; numbers of steps are given for so many."""
    rows: list[int] = field(init=False)
    """[B] index of each row in the caller's batch."""
    looked: Tensor = field(init=False)
    """[B L] bool, `left` as it was at the latest look. Since then the loop has only committed, and
    the window stayed: what is not in it is not left either."""
    pending: Tensor = field(init=False)
    """[B L] bool on the CPU, positions that keep their window open although they are written, for
    one more step; `edit` sets it, before every `edit` it is empty."""
    writable: Tensor = field(init=False)
    """[B L] bool, answer positions that were masks at first: all that may be revised or edited."""
    level: Tensor = field(init=False)
    """[B L] int64 on the CPU, the level of each position (see `mmdlm.layout`); -1 at padding."""
    turns: Tensor = field(init=False)
    """[B L] int64 on the CPU, when each position is opened by a plan in which every row has blocks
    of its own: 0 first; negative for earlier text and padding. The model's own blocks, counted from
    the one that holds the first canvas position, unless the plan says otherwise."""
    even: bool = True
    """The answer is of one level in every row."""
    flat: bool = True
    """All is of one level, and nothing is padding."""
    turn_size: int = 0
    """Positions of a whole turn or block, before answers were cut, where the plan says so."""
    nfe: int = 0
    """Forwards of the backbone so far, cache refreshes and guidance included."""
    step: int = 0
    """Steps done since the start."""
    window: Window = Window(0, 0)
    """The open positions."""
    planned: int = 0
    """Length of the canvas when the window was planned."""
    block: int = 0
    """Index of the window; it grows each time the window changes."""
    block_step: int = 0
    """Steps done since the window last changed."""
    block_masks: Tensor = field(default_factory=_nothing)
    """[B] masks in the window when it opened."""
    block_most: int = 0
    """The largest of these."""
    refresh: Refresh = Refresh(0, 0, cached=False)
    """The rows this step computes."""
    read: Window = Window(0, 0)
    """Bounds of the positions this step scores."""
    at: Tensor = field(default_factory=_nothing)
    """[B R] int64, the canvas positions this step scores, ascending in every row: all [B R] tensors
    below are about these. Rows with fewer of them repeat one, see `real`."""
    real: Tensor | None = None
    """[B R] bool, False where `at` repeats a position only to be as long as in other rows; None
    where all rows score the positions from `read.start` to `read.stop`."""
    open: Tensor = field(default_factory=_nothing)
    """[B R] bool, read positions that are masked and inside the window: those that may commit."""
    candidates: Tensor = field(default_factory=_nothing)
    """[B R] int64 candidate ids."""
    log_odds: Tensor = field(default_factory=_nothing)
    """[B R] float32 log p/(1-p) of the candidates: keeps the float64 order where p rounds to 1."""
    confidence: Tensor = field(default_factory=_nothing)
    """[B R] float32 ranking of the candidates; -inf where nothing may commit."""
    taken: Tensor = field(default_factory=_nothing)
    """[B R] bool, positions the current step committed."""
    worked: Tensor = field(default_factory=_nothing)
    """[B] int64, steps so far in which a row had open positions, and did not wait for others."""
    commit_step: Tensor = field(default_factory=_nothing)
    """[B G] int64 step that filled a position, -1 for none."""
    commit_confidence: Tensor = field(default_factory=_nothing)
    """[B G] float32 probability of a token when it was committed."""
    caches: dict[str, KV] = field(default_factory=dict)
    """Key/value buffers by the filling of the canvas they belong to, see `forward`."""
    memory: dict[Any, Any] = field(default_factory=dict)
    """What strategies keep between steps, under a name or under themselves. A tensor holds one
    entry per batch row and shrinks with the batch; anything else is left alone."""
    streams: list[torch.Generator] | None = None
    """One random stream per row of the caller's batch; made by the first draw."""

    text: int = 0
    """First column behind all media."""
    _left: Tensor | None = None

    def __post_init__(self) -> None:
        batch, length = self.tokens.shape
        answer = (batch, length - self.prompt)
        self.batch, self.rows, self.asked = batch, list(range(batch)), length - self.prompt
        if isinstance(self.source, Items) and len(self.source) != batch:
            raise ValueError(
                f"generator: {len(self.source)} for {batch} rows; give one, or one per row"
            )
        self.worked = torch.zeros(batch, dtype=torch.int64, device=self.tokens.device)
        self.commit_step = torch.full(answer, -1, device=self.tokens.device)
        self.commit_confidence = torch.zeros(answer, device=self.tokens.device)
        self.set_levels(self.sequence.level)
        self.writable = self.masked
        self.pending = torch.zeros_like(self.level, dtype=torch.bool)
        if self.sequence.media is not None and len(self.sequence.media):
            self.text = int(self.sequence.is_medium.any(0).nonzero()[-1]) + 1

    @property
    def tokens(self) -> Tensor:
        """[B L] int64 current ids."""
        return self.sequence.tokens

    @property
    def length(self) -> int:
        """L."""
        return self.tokens.shape[1]

    @property
    def thrifty(self) -> bool:
        """Only masks go through the head, which with a large vocabulary costs as much as the rest.

        Not on a GPU: there it costs the reading of its weights, and shapes had better not vary.
        """
        return self.tokens.device.type == "cpu"

    @property
    def masked(self) -> Tensor:
        """[B L] bool, canvas positions still to be filled; masks inside the prompt never count."""
        masked = self.tokens == self.model.spec.mask_id
        masked.narrow(1, 0, self.prompt).zero_()
        return masked

    @property
    def first_id(self) -> int:
        """The id that the first column of the logits stands for."""
        return 0 if self.columns is None else self.columns.start

    def ban_mask(self, logits: Tensor) -> Tensor:
        """Logits [... V] with the mask token at -inf, in place.

        It is an input, never an answer. The loop bans it behind all guides; those to whom the
        likeliest token or the sum of all matters do so before.
        """
        column = self.model.spec.mask_id - self.first_id
        if 0 <= column < logits.shape[-1]:
            logits[..., column] = -torch.inf
        return logits

    @property
    def probability(self) -> Tensor:
        """[B R] float32 probability of each candidate."""
        return self.log_odds.sigmoid()

    @property
    def unsettled(self) -> Tensor:
        """[B L] bool on the CPU, positions of each row that see a mask (or a pending position)."""
        first = self.left.int().argmax(1, keepdim=True)
        return self.level >= self.level.gather(1, first)

    def set_levels(self, level: Tensor) -> None:
        """Says who attends to whom, [B L] int64; before the first step."""
        self.sequence = replace(self.sequence, level=level)
        real = self.sequence.mask.cpu()
        self.level = level.cpu().masked_fill(~real, -1)
        first = self.level[:, self.prompt : self.prompt + 1]
        self.even = bool((self.level[:, self.prompt :] == first).all())
        self.flat = bool(self.level.min() == self.level.max())
        self.turns = (self.level - first).masked_fill(~real, -1)

    @property
    def left(self) -> Tensor:
        """[B L] bool, `masked` on the CPU; `pending` positions count.

        What hooks that decide on the host use. The first to ask after a write looks at the device,
        and waits for it; where nobody asks, nobody waits.
        """
        if self._left is None:
            self._left = self.looked = self.masked.cpu() | self.pending
        return self._left

    def wrote(self) -> None:
        """Called after every write: what the host knows is out of date."""
        self._left = None

    def opened(self, start: int, stop: int) -> Tensor:
        """[B stop-start] bool, canvas positions that are masked and inside the window."""
        masked = self.tokens.narrow(1, start, stop - start) == self.model.spec.mask_id
        first, last, turn = self.window
        if turn is None and first <= start and stop <= last:  # and so behind the prompt
            return masked
        return masked & self.within().narrow(1, start, stop - start)

    def within(self) -> Tensor:
        """[B L] bool, the positions of the window."""
        inside = torch.zeros_like(self.tokens, dtype=torch.bool)
        inside[:, self.window.start : self.window.stop] = True
        if self.window.turn is not None:
            inside &= (self.turns == self.window.turn).to(inside.device)
        return inside

    def here(self, values: Tensor) -> Tensor:
        """[B R] of flags [B L], at the positions this step scores; False where one is repeated."""
        if self.real is None:
            return values[:, self.read.start : self.read.stop]
        return take(values, self.at) & self.real

    def focus(self, read: Window, only: Tensor | None = None) -> None:
        """Sets the positions this step scores, and which of them may commit.

        Args:
            read: their bounds.
            only: [B L] bool on the CPU, those of each row; None for all between the bounds.
        """
        self.read = read
        span = torch.arange(read.start, read.stop, device=self.tokens.device)
        self.at, self.real = span.expand(len(self.tokens), -1), None
        self.open = self.opened(read.start, read.stop)
        if only is not None:
            at, real = listed(only)  # a row without any reads the first position for nothing
            self.at, self.real = at.clamp(min=read.start).to(span.device), real.to(span.device)
            self.open = self.open.gather(1, self.at - read.start) & self.real

    def put(self, target: Tensor, taken: Tensor, values: Tensor | int, start: int = 0) -> None:
        """Writes values at some of the positions this step scores.

        Args:
            target: [B N], changed in place.
            taken: [B R] bool, where to write.
            values: [B R], or one for all.
            start: canvas position of the first column of `target`.
        """
        if self.real is None:
            window = target.narrow(1, self.read.start - start, self.read.stop - self.read.start)
            window.copy_(torch.where(taken, values, window))
            return
        # All that is not taken goes to a column of its own: a repeated position must not write.
        spare = torch.cat([target, target[:, :1]], 1)
        place = torch.where(taken, self.at - start, target.shape[1])
        values = torch.as_tensor(values, device=target.device, dtype=target.dtype)
        spare.scatter_(1, place, values.expand(place.shape))
        target.copy_(spare[:, :-1])

    @property
    def size(self) -> int:
        """Positions of a window like this one in a row that holds all of it."""
        return self.turn_size or self.window.stop - self.window.start

    def share(self, steps: int) -> int:
        """This window's part of steps that are given for the whole answer, at least one."""
        # A block of the model's own may be longer than the answer.
        return max(1, round(steps * min(self.size, self.asked) / self.asked))

    def forward(self, tokens: Tensor | None = None, cache: str = "canvas") -> Tensor:
        """Logits [B R V] of the read positions; counts one forward, or two with rows to store.

        Args:
            tokens: [B L] another filling of the canvas (guidance); None for the canvas itself.
            cache: name of the key/value buffers; every filling needs its own.
        """
        sequence = self.sequence if tokens is None else self.sequence.with_tokens(tokens)
        rows = self.refresh
        kv = None
        if rows.cached:
            if cache not in self.caches:
                self.caches[cache] = self.model.backbone.cache(len(self.tokens), self.length)
            kv = self.caches[cache]
            kv.steady = False
        if rows.store is not None:
            start, stop, _ = rows.store
            one = start + self.model.spec.shift  # not none: kernels may refuse empty queries
            kv.end = stop
            self._run(sequence, slice(start, stop), slice(one, one + 1), kv)
        if kv is not None:
            kv.end = rows.attend or self.length
            if rows.renew is not None:
                kv = Held(kv, rows.renew.to(self.tokens.device))
        fed: Rows = slice(rows.start, rows.stop)
        if rows.rows is not None:
            fed = listed(rows.rows)[0].to(self.tokens.device)
        read: Rows = self.at
        if self.real is None and rows.rows is None:
            read = slice(*self.read[:2])
        if kv is not None:
            kv.steady = rows.start >= self.text
        return self._run(sequence, fed, read, kv)

    def _run(self, sequence: Sequence, rows: Rows, read: Rows, kv: KV | None) -> Tensor:
        self.nfe += 1
        mask = self._mask(sequence, rows, self.length if kv is None else kv.end)
        return self.model.run(sequence, rows, read, kv, self.columns, mask)

    def _mask(self, sequence: Sequence, rows: Rows, end: int) -> Tensor | None:
        """Which of the first `end` keys the rows may attend to, [B M end] bool; None for all.

        That it is all of them is found out on the host: kernels without a mask are faster, and a
        look at the device would wait for it.
        """
        seen, keys = self.refresh.seen, self.level[:, :end]
        if self.flat and seen is None:
            return None
        queries = self.level[:, rows] if isinstance(rows, slice) else self.level
        everything = bool(keys.min() >= 0) and bool(queries.min() >= keys.max())
        if everything and (seen is None or bool(seen[:, :end].all())):
            return None
        allowed = sequence.mask[:, :end]
        if seen is not None:
            allowed = allowed & seen[:, :end].to(allowed.device)
        return seen_by(take(sequence.level, rows), sequence.level[:, :end], allowed)

    def uniform(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random numbers [B R *size] in [0, 1), 0.5 at positions that are not open.

        Every row draws from a stream of its own and for its open positions only. So a row gets the
        same numbers whatever stands beside it, if it starts from the same seed: give `decode` one
        generator per row to have a row of a batch repeat what it gives alone.
        """
        if self.streams is None:
            self.streams = streams(self.source, self.batch, self.tokens.device)
        draws = torch.full((*self.open.shape, *size), 0.5, dtype=dtype, device=self.open.device)
        for i, count in enumerate(self.open.sum(1).tolist()):
            stream = self.streams[self.rows[i]]
            new = torch.rand(count, *size, generator=stream, dtype=dtype, device=stream.device)
            draws[i, self.open[i]] = new
        return draws

    def forget(self) -> None:
        """Drops all keys and values."""
        for kv in self.caches.values():
            kv.release()
        self.caches.clear()

    def keep(self, rows: Tensor) -> None:
        """Shrinks the batch.

        Args:
            rows: [n] int64 on the CPU, ascending: the rows that stay.
        """
        self.rows = [self.rows[i] for i in rows.tolist()]
        self._left = self.left[rows]
        for name in ("looked", "level", "turns", "pending"):
            setattr(self, name, getattr(self, name)[rows])
        at = rows.to(self.tokens.device)
        self.sequence = chosen(self.sequence, at)
        for kv in self.caches.values():
            kv.keep(at)
        for name, value in self.memory.items():
            if isinstance(value, Tensor):
                self.memory[name] = value[rows.to(value.device)]
        for name in (
            *("block_masks", "at", "open", "candidates", "log_odds", "confidence", "taken"),
            *("writable", "worked", "commit_step", "commit_confidence"),
        ):
            value = getattr(self, name)
            setattr(self, name, value[at] if len(value) else value)
        self.real = None if self.real is None else self.real[at]
