"""Requests that join and leave a running batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from mmdlm.backbones.linear import active, packed, using
from mmdlm.decoding import loop, preset, rows
from mmdlm.decoding.conversation import Turn, continued, resume, saved
from mmdlm.decoding.events import Committed, Finished
from mmdlm.decoding.loop import assign
from mmdlm.decoding.memory import Memory
from mmdlm.decoding.start import Source, committable, fitting, start, unpacked
from mmdlm.decoding.state import State
from mmdlm.decoding.strategy import Strategy, check_model
from mmdlm.decoding.view import View
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM, require_model
from mmdlm.processor import Packed

NO_TOKEN = (
    "a position had no possible token: the model gave NaN (check the weights, or load with "
    "dtype=float32), or strategies such as Suppress and Nucleus left none"
)


class Session:
    """A running batch: requests are added and removed while others are being decoded.

    Every request has its own clock and its own random stream: whenever it is added, it gets the
    tokens, steps and number of forwards that it gets alone. (In low precision other shapes may
    break near-ties otherwise; `ODD` makes rows differ on purpose.) Weights must not change while
    requests are running. A session is not thread-safe; several sessions may share a model.

    Args:
        model: the model.
        strategies: instances, or the name of a preset, see `mmdlm.decode`.
        columns: range of ids that may be committed; the head computes only these.
    Raises:
        ValueError: the strategies do not fit together, or do not fit the model.
    """

    def __init__(
        self,
        model: MultimodalDLM,
        strategies: preset.Choice = (),
        *,
        columns: slice | None = None,
    ) -> None:
        require_model(model, "Session")
        self.model, self.columns = model, columns
        self.owners = assign(fitting(preset.strategies(strategies), model))
        ids = committable(columns, model)
        for strategy in self.owners["all"]:
            check_model(strategy, model)
        self._shared = {id(s): s.prepare(model, ids) for s in self.owners["all"]}
        self._state: State | None = None
        self._waiting: list[State] = []
        self._done: list[Finished] = []
        self._turns: dict[int, Turn] = {}
        self._kept: set[int] = set()
        self._features: dict[int, dict[Hashable, Tensor]] = {}
        self._next, self._planned, self._calls = 0, False, 0
        self._packs = active()
        self._events: list[Committed] = []

    @property
    def calls(self) -> int:
        """Forwards of the backbone so far, for all requests together."""
        return self._calls + (0 if self._state is None else self._state.calls)

    @property
    def keys(self) -> list[int]:
        """Requests that are not finished, in the order of their rows."""
        return [key for state in self._states for key in state.keys]

    @property
    def _states(self) -> list[State]:
        """The batch, and the rows that wait to join it."""
        return ([] if self._state is None else [self._state]) + self._waiting

    @torch.inference_mode()
    def add(
        self,
        prompt: Tensor | Sequence | Packed,
        length: int | None = None,
        *,
        generator: torch.Generator | None = None,
        canvas: Tensor | None = None,
        keep: bool = False,
    ) -> int:
        """Adds one request; it takes part from the next step on.

        Args:
            prompt: token ids [P], a laid-out Sequence of one row, or one example packed by the
                model's processor, whose media are encoded and whose canvas is filled.
            length: positions G to fill; None for a packed example.
            generator: source of its random draws; None: torch's own.
            canvas: [G] int64 answer of which only the masks are filled in; None: all masks.
            keep: hold what `extend` needs when the answer is complete, keys and values too.
        Returns:
            its key.
        Raises:
            ValueError: see `mmdlm.decode`, or there is more than one row, or no length.
        """
        features: dict[Hashable, Tensor] = {}
        prompt, length, canvas = unpacked(self.model, prompt, length, canvas, features)
        if isinstance(prompt, Tensor) and prompt.ndim == 1:
            prompt = prompt[None]
        count = len(prompt if isinstance(prompt, Tensor) else prompt.tokens)
        if count != 1:
            raise ValueError(f"add: the prompt has {count} rows, expected 1; use add_rows")
        key = self.add_rows(prompt, length, generator=generator, canvas=canvas, keep=keep)[0]
        if keep and features:
            self._features[key] = features
        return key

    @torch.inference_mode()
    def add_rows(
        self,
        prompt: Tensor | Sequence,
        length: int,
        *,
        mask: Tensor | None = None,
        generator: Source = None,
        canvas: Tensor | None = None,
        keep: bool = False,
        alternatives: Mapping[str, Tensor | Sequence] | None = None,
    ) -> list[int]:
        """Adds one request per row; see `add`.

        Args:
            prompt: token ids [B P] or a laid-out Sequence.
            length: positions G to fill.
            mask: [B P] key padding of token ids, True = real; pad on the left.
            generator: one for the rows or one per row; None: torch's own.
            canvas: [B G] int64.
            keep: see `add`.
            alternatives: see `mmdlm.decode`.
        """
        given = (prompt, length, mask, generator, self.columns, canvas, self._next, alternatives)
        state = start(self.model, *given)
        self._next += len(state.keys)
        if keep:
            self._kept |= set(state.keys)
        return self._enter(state)

    def _enter(self, state: State) -> list[int]:
        """Prepares new rows, and lets them wait for the next step."""
        with packed(getattr(self.model, "backbone", None)):
            self._packs = active()
        keys = list(state.keys)
        everyone, owner = self.owners["all"], self.owners["refresh"][0]
        readers = (owner, *self.owners.get("look", ()))
        state.memories = {id(s): Memory({}, self._shared[id(s)]) for s in everyone}
        for each in state.prompts:
            for strategy in self.owners.get("layout", ()):
                each.set_levels(strategy.layout(View(each)))
        for s in everyone:
            state.memories[id(s)] = Memory(s.begin(View(state)), self._shared[id(s)])
        loop.end(state, self.owners)
        state.wrote()
        for other in state.alternatives.values():
            view = View(other)
            other.memories = {id(s): Memory(s.begin(view), self._shared[id(s)]) for s in readers}
        self._done += self._leave(state, state.left.any(1))
        for each in state.prompts if state.keys else ():
            if (kv := owner.cache(View(each))) is not None:
                each.caches["canvas"] = kv
        if state.keys:
            self._waiting.append(state)
        return keys

    @torch.inference_mode()
    def step(self) -> list[Committed | Finished]:
        """One step of every request.

        Returns:
            what was committed, and the answers that are complete.
        Raises:
            ValueError: nothing could be written because the model gave NaN.
        """
        self.advance()
        events: list[Committed | Finished] = [*self._events, *self._done]
        self._done = []
        if any(e.confidence.isnan().any() for e in events if isinstance(e, Finished)):
            raise ValueError(NO_TOKEN)
        return events

    def finished(self) -> list[Finished]:
        """The answers completed since they were last taken, for those who call `advance`."""
        done, self._done = self._done, []
        return done

    @torch.inference_mode()
    def advance(self, *, events: bool = True) -> bool:
        """One step of every request, without a report.

        Args:
            events: note what is committed, which waits for the device.
        Returns:
            whether any request is left.
        """
        self._events = []
        self._join()
        state = self._state
        if state is not None and not self._planned:
            self._done += self._leave(state, loop.plan(state, self.owners))
        if state is None or not state.keys:
            self._drop_empty()
            return False
        stays = loop.lasts(state, self.owners)
        with using(self._packs):
            loop.step(state, self.owners, on_commit=self._note if events else None)
        self._planned = stays
        if not stays:
            self._done += self._leave(state, state.left.any(1))
        self._drop_empty()
        return bool(self.keys)

    def _drop_empty(self) -> None:
        """Forgets a batch whose last row has left."""
        if self._state is not None and not self._state.keys:
            self._calls += self._state.calls
            self._state = None

    def _join(self) -> None:
        """Takes the waiting rows into the batch."""
        for new in self._waiting:
            self._planned = False
            if self._state is None:
                self._state = new
            else:
                rows.join(self._state, new)
        self._waiting = []

    def _note(self, state: State) -> None:
        """Remembers what a step committed."""
        taken, at = state.taken.cpu(), state.at.cpu() - state.prompt
        tokens, sure = state.candidates.cpu(), state.log_odds.sigmoid().cpu()
        for i, key in enumerate(state.keys):
            where = taken[i]
            if bool(where.any()):
                found = (each[i][where].tolist() for each in (at, tokens, sure))
                self._events.append(Committed(key, *found))

    def _leave(self, state: State, busy: Tensor) -> list[Finished]:
        """Takes rows out of the batch that are not busy, [B] bool on the host."""
        if bool(busy.all()):
            return []
        done = (~busy).nonzero()[:, 0].tolist()
        found = [rows.finished(state, i) for i in done]
        for i in done if self._kept else ():
            if (key := state.keys[i]) in self._kept:
                self._turns[key] = saved(state, i)
        rows.keep(state, busy.nonzero()[:, 0])
        return found

    @torch.inference_mode()
    def extend(
        self,
        key: int,
        prompt: Tensor | Sequence | Packed,
        length: int | None = None,
        *,
        generator: torch.Generator | None = None,
        canvas: Tensor | None = None,
    ) -> int:
        """Asks for the next answer of a conversation; equal to a fresh decode of all of it.

        Keys and values of the earlier text are reused as far as new text cannot change them: whole
        blocks of a block-causal model, media of a cascade; nothing with full attention. Media of a
        packed example that earlier turns held are not encoded again.

        Args:
            key: a finished request that was added with `keep=True`.
            prompt: token ids [n] that follow the answer (up to its first end token, which stays),
                or a laid-out Sequence or packed example with all of the conversation.
            length: see `add`.
            generator: see `add`.
            canvas: see `add`.
        Returns:
            the same key.
        Raises:
            KeyError: the request is not finished, or was added without `keep=True`.
            ValueError: see `mmdlm.decode`; another prompt can still extend the conversation.
        """
        if key not in self._turns:
            raise KeyError(
                f"request {key} cannot be extended; it must be finished, and added with keep=True"
            )
        features = self._features.get(key, {})
        prompt, length, canvas = unpacked(self.model, prompt, length, canvas, features)
        turn = self._turns[key]
        if isinstance(prompt, Tensor):
            prompt = continued(self.model, turn, prompt)
        state = start(self.model, prompt, length, None, generator, self.columns, canvas, key)
        for strategy in self.owners.get("layout", ()):
            state.set_levels(strategy.layout(View(state)))
        if type(self.owners["refresh"][0]).cache is Strategy.cache:
            resume(state, turn)
        if features:
            self._features[key] = features
        del self._turns[key]  # only now, so that a refused prompt leaves the conversation as it was
        self._enter(state)
        return key

    @torch.inference_mode()
    def fork(
        self,
        key: int,
        *,
        generator: Source = None,
        again: Tensor | None = None,
    ) -> int:
        """Copies a running request as it stands; from the next step on, both go on.

        The copy has the request's tokens, clock, number of forwards, keys and values, and what
        strategies remember.

        Args:
            key: a running request.
            generator: source of the copy's random draws; None: it goes on with those of the
                request, and so gets the same tokens.
            again: [G] bool, positions of the answer that are masks again in the copy, as if they
                had never been committed; those that were given stay. None for none.
        Returns:
            the key of the copy.
        Raises:
            KeyError: the request is not running.
            ValueError: `again` is not of the answer's size.
        """
        state, row, _ = self._find(key)
        new = rows.forked(state, row, self._next, generator)
        if again is not None:
            rows.reopen(new, again)
        self._next += 1
        self._waiting.append(new)
        if key in self._kept:
            self._kept |= set(new.keys)
        return new.keys[0]

    def remove(self, key: int) -> None:
        """Drops a request, running or kept.

        Raises:
            KeyError: there is no such request.
        """
        known = self._turns.pop(key, None) is not None
        self._features.pop(key, None)
        self._kept.discard(key)
        for state in self._states:
            if key in state.keys:
                known = True
                stay = [i for i, other in enumerate(state.keys) if other != key]
                rows.keep(state, torch.tensor(stay, dtype=torch.int64))
        self._waiting = [state for state in self._waiting if state.keys]
        self._drop_empty()
        if not known:
            raise KeyError(f"there is no request {key}; running: {self.keys}")

    def conversation(self, key: int) -> Sequence:
        """A finished request that was added with `keep=True`, as it was laid out at its end.

        Raises:
            KeyError: there is no such request.
        """
        if key not in self._turns:
            raise KeyError(f"request {key} is not finished, or was added without keep=True")
        return self._turns[key].sequence

    def canvas(self, key: int) -> Tensor:
        """[G] int64 ids of an answer so far; what is open holds the mask id.

        Raises:
            KeyError: the request is not running.
        """
        state, row, size = self._find(key)
        return state.tokens[row, state.prompt : state.prompt + size].clone()

    def confidence(self, key: int) -> Tensor:
        """[G] float32 probability of each token of an answer so far when it was committed, else 0.

        Raises:
            KeyError: the request is not running.
        """
        state, row, size = self._find(key)
        return state.commit_confidence[row, :size].clone()

    def _find(self, key: int) -> tuple[State, int, int]:
        """The rows that a running request is in, its row, and the length of its answer."""
        for state in self._states:
            if key in state.keys:
                row = state.keys.index(key)
                return state, row, int(state.lengths[row])
        raise KeyError(f"request {key} is not running; running: {self.keys}")
