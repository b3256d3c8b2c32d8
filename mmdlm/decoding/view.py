"""What strategies see of a running batch: everything to read, nothing to write."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdlm.decoding import forward as forwards
from mmdlm.decoding.memory import Memory

if TYPE_CHECKING:
    from mmdlm.decoding.state import State

# fmt: off
READABLE = frozenset((
    "model", "sequence", "tokens", "prompt", "length", "columns", "keys", "asked", "answer",
    "lengths", "level", "flat", "one_level", "even", "step", "block", "block_step", "block_masks",
    "block_size", "forwards", "final", "has_cache", "plan", "region", "opened", "held", "left",
    "left_before", "masked", "writable", "unsettled", "commit_step", "commit_confidence", "caches",
    "refresh", "at", "read", "real", "here", "open", "candidates", "log_odds", "confidence",
    "taken", "score_masked_only",
))
# fmt: on
"""Attributes of `State` that strategies may read; they are described there."""


class View:
    """A read-only `State`: attributes are those of `READABLE`, and what follows.

    Tensors are those of the loop: strategies never write into them.

    Args:
        state: the rows.
    """

    __slots__ = ("_state",)

    def __init__(self, state: State) -> None:
        object.__setattr__(self, "_state", state)

    def __getattr__(self, name: str) -> Any:
        if name in READABLE:
            return getattr(self._state, name)
        raise AttributeError(f"a decode has no {name!r} that strategies may read")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"strategies cannot set {name!r}: only the loop writes; declare in begin() what is to "
            "be remembered, and use view.memory(self)"
        )

    @property
    def device(self) -> torch.device:
        """Where tokens and logits are."""
        return self._state.tokens.device

    @property
    def probability(self) -> Tensor:
        """[B R] float32 probability of each candidate."""
        return self._state.log_odds.sigmoid()

    @property
    def first_id(self) -> int:
        """The id that the first column of the logits stands for."""
        columns = self._state.columns
        return 0 if columns is None else columns.start

    @property
    def settled(self) -> Tensor:
        """[B] host int64: positions of lower levels need not be recomputed (see `State.final`)."""
        return settled(self._state)

    def derived(self, name: Hashable, make: Callable[[View], Any]) -> Any:
        """A value derived from `plan`, `level` and the name alone, made once until they change.

        Args:
            name: name of the value, with everything else it depends on.
            make: makes it.
        """
        noted = self._state.noted
        if name not in noted:
            noted[name] = make(self)
        return noted[name]

    def memory(self, strategy: object) -> Memory:
        """What a strategy remembers: entries of `begin` by name, and objects of `prepare`."""
        return self._state.memories[id(strategy)]

    def ban_mask(self, logits: Tensor) -> Tensor:
        """Logits [... V] with the mask token at -inf, in place: it is an input, never an answer."""
        return ban_mask(self._state, logits)

    def share(self, steps: int | Tensor) -> Tensor:
        """[B] host int64, each block's part of steps given for the whole answer, 1 or more.

        Args:
            steps: number of steps, or [B].
        """
        # A block of the model's own may be longer than the answer.
        asked = self._state.asked
        part = steps * torch.minimum(self._state.block_size, asked).double() / asked
        return part.round().long().clamp(min=1)

    def placed(
        self, target: Tensor, where: Tensor, values: Tensor | float, start: int = 0
    ) -> Tensor:
        """A copy of [B N] with values at some of the scored positions.

        Args:
            target: [B N].
            where: [B R] bool.
            values: [B R], [B 1], or one for all.
            start: canvas position of the first column of `target`.
        """
        copy = target.clone()
        self._state.put(copy, where, values, start)
        return copy

    def forward(self, tokens: Tensor, cache: str) -> Tensor:
        """Logits [B R V] of the scored positions after other prompts of the same layout.

        Costs as many forwards as the step itself, which are counted.

        Args:
            tokens: [B L] int64.
            cache: name of the key/value buffers; every filling needs its own.
        """
        return forwards.run(self._state, tokens, cache)

    @property
    def alternatives(self) -> tuple[str, ...]:
        """Names of the alternative prompts, see `mmdlm.decode`."""
        return tuple(self._state.alternatives)

    def alternative(self, name: str) -> Tensor:
        """Logits [B R V] of the scored positions after an alternative prompt, to be counted.

        Args:
            name: one of `alternatives`; once per step each.
        """
        state, other = self._state, self._state.alternatives[name]
        other.calls, other.forwards = 0, torch.zeros_like(state.forwards)
        logits = forwards.run(other)
        state.calls += other.calls
        state.forwards += other.forwards
        return logits

    def multinomial(self, logits: Tensor, where: Tensor) -> Tensor:
        """[B R] int64 columns drawn from softmax(logits), each row from its own stream.

        Args:
            logits: [B R V] of the scored positions.
            where: [B L] host bool, positions for which a row draws, the scored ones among them; so
                the numbers drawn do not depend on how many are still open.
        """
        p, found = logits.softmax(-1), torch.empty_like(self._state.at)
        for i, row in enumerate(where):
            places = row.nonzero()[:, 0].to(p.device)
            table = p.new_ones(len(places), p.shape[-1])
            at = torch.searchsorted(places, self._state.at[i]).clamp(max=len(places) - 1)
            table[at] = p[i]
            made, number = self._state.draws[i]
            found[i] = torch.multinomial(table, 1, generator=made[number])[at, 0]
        return found

    def uniform(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random numbers [B R *size] in [0, 1), 0.5 at positions that are not open.

        Every row draws from its own stream and for its open positions only, so it gets the same
        numbers alone and in any batch, if it starts from the same seed.
        """
        state = self._state
        draws = torch.full((*state.open.shape, *size), 0.5, dtype=dtype, device=self.device)
        for i, count in enumerate(state.open.sum(1).tolist()):
            if count:
                draws[i, state.open[i]] = self._draw(i, count, *size, dtype=dtype)
        return draws

    def uniform_at(self, where: Tensor) -> Tensor:
        """[B L] float32 random numbers in [0, 1), 1 elsewhere; each row from its own stream.

        Args:
            where: [B L] host bool, positions that draw.
        """
        draws = torch.ones(where.shape, device=self.device)
        for i, row in enumerate(where):
            at = row.nonzero()[:, 0].to(self.device)
            if len(at):
                draws[i, at] = self._draw(i, len(at))
        return draws

    def _draw(self, row: int, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made, number = self._state.draws[row]
        stream = made[number]
        return torch.rand(*size, generator=stream, dtype=dtype, device=stream.device)


def settled(state: State) -> Tensor:
    """[B] host int64: levels below it are cached, or belong to known tokens that see no mask.

    The level of a row's first mask, or less where tokens were taken back.
    """
    # From the host copy before the latest commits, which needs no device-to-host sync.
    first = state.left_before.int().argmax(1, keepdim=True)
    return torch.minimum(state.final, state.level.gather(1, first)[:, 0])


def ban_mask(state: State, logits: Tensor) -> Tensor:
    """Logits [... V] with the mask token at -inf, in place."""
    column = state.model.spec.mask_id - (0 if state.columns is None else state.columns.start)
    if 0 <= column < logits.shape[-1]:
        logits[..., column] = -torch.inf
    return logits
