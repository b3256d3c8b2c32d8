"""What a run of the denoising loop knows."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmdlm.backbones.kv import KV, Held
from mmdlm.decoding.strategy import Refresh, Window
from mmdlm.layout import MEDIA, Sequence
from mmdlm.model import MultimodalDLM

Source = torch.Generator | Items[torch.Generator] | None
"""Where random draws come from: one generator for the batch, one per row, or torch's own."""


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

    model: MultimodalDLM
    sequence: Sequence
    prompt: int
    source: Source = None
    columns: slice | None = None

    batch: int = field(init=False)
    """Rows of the caller's batch."""
    rows: list[int] = field(init=False)
    """[B] index of each row in the caller's batch."""
    left: Tensor = field(init=False)
    """[B L] bool, `masked` on the CPU as of the latest write: the one look at the device a step
    needs, so hooks that decide on the host use this."""
    level: Tensor = field(init=False)
    """[B L] int64 on the CPU, the level of each position (see `mmdlm.layout`); -1 at padding."""
    turns: Tensor = field(init=False)
    """[B L] int64 on the CPU, when each position is opened by a plan in which every row has blocks
    of its own: 0 first; negative for earlier text and padding. The model's own blocks, counted from
    the one that holds the first canvas position, unless the plan says otherwise."""
    turn_size: int = 0
    """Positions of a whole turn, from the plan that opens turns."""
    nfe: int = 0
    """Forwards of the backbone so far, cache refreshes and guidance included."""
    step: int = 0
    """Steps done since the start."""
    window: Window = Window(0, 0)
    """The open positions."""
    block: int = 0
    """Index of the window; it grows each time the window changes."""
    block_step: int = 0
    """Steps done since the window last changed."""
    block_masks: Tensor = field(default_factory=_nothing)
    """[B] masks in the window when it opened."""
    refresh: Refresh = Refresh(0, 0, cached=False)
    """The rows this step computes."""
    read: Window = Window(0, 0)
    """The R positions this step scores: all [B R] tensors below are about these."""
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

    def __post_init__(self) -> None:
        batch, length = self.tokens.shape
        answer = (batch, length - self.prompt)
        self.batch, self.rows = batch, list(range(batch))
        if isinstance(self.source, Items) and len(self.source) != batch:
            raise ValueError(
                f"generator: {len(self.source)} for {batch} rows; give one, or one per row"
            )
        self.commit_step = torch.full(answer, -1, device=self.tokens.device)
        self.commit_confidence = torch.zeros(answer, device=self.tokens.device)
        self.set_levels(self.sequence.level)
        self.look()

    @property
    def tokens(self) -> Tensor:
        """[B L] int64 current ids."""
        return self.sequence.tokens

    @property
    def length(self) -> int:
        """L."""
        return self.tokens.shape[1]

    @property
    def masked(self) -> Tensor:
        """[B L] bool, canvas positions still to be filled; masks inside the prompt never count."""
        masked = self.tokens == self.model.spec.mask_id
        masked[:, : self.prompt] = False
        return masked

    @property
    def probability(self) -> Tensor:
        """[B R] float32 probability of each candidate."""
        return self.log_odds.sigmoid()

    def set_levels(self, level: Tensor) -> None:
        """Says who attends to whom, [B L] int64; before the first step."""
        self.sequence = replace(self.sequence, level=level)
        real = self.sequence.mask.cpu()
        self.level = level.cpu().masked_fill(~real, -1)
        first = self.level[:, self.prompt : self.prompt + 1]
        self.turns = (self.level - first).masked_fill(~real, -1)

    def look(self) -> None:
        """Copies which positions are masked to the host."""
        self.left = self.masked.cpu()

    def opened(self, start: int, stop: int) -> Tensor:
        """[B stop-start] bool, canvas positions that are masked and inside the window."""
        is_open = self.masked[:, start:stop]
        is_open[:, : max(0, self.window.start - start)] = False
        is_open[:, max(0, self.window.stop - start) :] = False
        if self.window.turn is not None:
            is_open &= (self.turns[:, start:stop] == self.window.turn).to(is_open.device)
        return is_open

    def focus(self, read: Window) -> None:
        """Sets the positions this step scores, and which of them may commit."""
        self.read, self.open = read, self.opened(read.start, read.stop)

    @property
    def size(self) -> int:
        """Positions of a window like this one in a row that holds all of it."""
        start, stop, turn = self.window
        return stop - start if turn is None else self.turn_size

    def share(self, steps: int) -> int:
        """This window's part of steps that are given for the whole answer, at least one."""
        return max(1, round(steps * self.size / (self.length - self.prompt)))

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
        if rows.store is not None:
            start, stop, _ = rows.store
            one = start + self.model.spec.shift  # not none: kernels may refuse empty queries
            kv.end = stop
            self._run(sequence, slice(start, stop), slice(one, one + 1), kv)
        if kv is not None:
            kv.end = rows.attend or self.length
            if rows.renew is not None:
                kv = Held(kv, rows.renew.to(self.tokens.device))
        return self._run(sequence, slice(rows.start, rows.stop), slice(*self.read[:2]), kv)

    def _run(self, sequence: Sequence, rows: slice, read: slice, kv: KV | None) -> Tensor:
        self.nfe += 1
        return self.model.run(sequence, rows, read, kv, self.columns)

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

    def keep(self, rows: Tensor) -> None:
        """Shrinks the batch.

        Args:
            rows: [n] int64 on the CPU, ascending: the rows that stay.
        """
        self.rows = [self.rows[i] for i in rows.tolist()]
        self.left, self.level, self.turns = self.left[rows], self.level[rows], self.turns[rows]
        at = rows.to(self.tokens.device)
        self.sequence = chosen(self.sequence, at)
        for kv in self.caches.values():
            kv.keep(at)
        for name, value in self.memory.items():
            if isinstance(value, Tensor):
                self.memory[name] = value[rows.to(value.device)]
        for name in (
            *("block_masks", "open", "candidates", "log_odds", "confidence", "taken"),
            *("commit_step", "commit_confidence"),
        ):
            value = getattr(self, name)
            setattr(self, name, value[at] if len(value) else value)


def chosen(sequence: Sequence, rows: Tensor) -> Sequence:
    """Some rows of a laid-out batch without branches, with their media."""
    media = sequence.media
    if media is not None:
        slots = sequence.kind == MEDIA
        stays = torch.zeros(len(slots), dtype=torch.bool, device=slots.device)
        stays[rows] = True
        media = media[stays[:, None].expand_as(slots)[slots]]
    names = ("tokens", "kind", "mask", "positions", "level")
    return replace(sequence, **{n: getattr(sequence, n)[rows] for n in names}, media=media)


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
